"""What all figures have in common: size, colours, the mark of each model, legends."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hipp_ext.files.untrusted import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The first colour is the dense model's. On paper these; a page has its own, see `PAGE_COLOURS`.
COLOURS = ("#69727d", "#3c6fc4", "#d2722f", "#3f9a5c", "#c04a55", "#8466b8", "#947038")
SHAPES = ("o", "s", "^", "D", "v", "P")  # the next one wherever the colours begin again
INK, FAINT, PAPER = "#22262b", "#cfd4da", "#ffffff"  # text and axes; grids and frames; background
PAGE_COLOURS = {INK: "currentColor", FAINT: "var(--line)", PAPER: "var(--card)"} | {
    colour: f"var(--model-{number})" for number, colour in enumerate(COLOURS)
}
_WIDTH = 4.0  # [inches]; on a phone, 340 pixels wide, a letter of 9.5 points has 11 pixels
_LONGEST_NAME = 40  # name in a figure [characters]
SMALL = 9.5  # size of the smallest letters [points]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """How a model is drawn in every figure of a report.

    Attributes:
        number: number of its colour in `COLOURS`.
        shape: shape of its points, for matplotlib.
    """

    number: int
    shape: str

    @property
    def colour(self) -> str:
        """Its colour on paper."""
        return COLOURS[self.number]


def marks(names: Iterable[str]) -> dict[str, Mark]:
    """The mark of each model; the first has the colour of the dense model."""
    found = {}
    for place, name in enumerate(dict.fromkeys(names)):
        turn, number = divmod(place, len(COLOURS))
        found[name] = Mark(number=number, shape=SHAPES[turn % len(SHAPES)])
    return found


def label(name: str) -> str:
    """A short name for a figure. Matplotlib would read $ as mathematics and hide names that start
    with _.
    """
    text = shown(name)
    if len(text) > _LONGEST_NAME:  # names of one family differ at their ends
        half = _LONGEST_NAME // 2
        text = f"{text[: half - 1]}…{text[-half:]}"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def legend(figure: "Figure", axes: Any) -> None:
    """The legend above the panels, in as many columns as there is room for."""
    handles, names = axes.get_legend_handles_labels()
    columns = next((c for c in (3, 2) if _legend_width(names, c) <= _WIDTH), 1)
    # matplotlib fills columns, and people read lines.
    order = sorted(range(len(names)), key=lambda i: i % columns)
    figure.legend(
        [handles[i] for i in order],
        [names[i] for i in order],
        loc="outside upper left",
        ncols=columns,
        fontsize=SMALL,
        frameon=False,
        handlelength=1.5,
        handletextpad=0.6,
        columnspacing=1.2,
    )


def _legend_width(names: Sequence[str], columns: int) -> float:
    """About how wide the legend is [inches]: letters of 0.6 em, and 3.5 em beside each name."""
    longest = [max(map(len, names[place::columns]), default=0) for place in range(columns)]
    return sum(0.6 * length + 3.5 for length in longest) * SMALL / 72


@contextlib.contextmanager
def drawing(height: float) -> Iterator["Figure"]:
    """A figure of `height` [inches]; what is drawn in the block takes its style."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    )
    style |= {"axes.edgecolor": FAINT, "grid.color": FAINT, "grid.alpha": 0.5}
    style |= {"axes.facecolor": PAPER, "axes.grid": True, "axes.axisbelow": True}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    style |= {"axes.titlesize": 10.5, "axes.labelsize": 10.5, "grid.linewidth": 0.6}
    style |= {"xtick.labelsize": SMALL, "ytick.labelsize": SMALL}
    style |= {"font.size": 10.5, "xtick.major.size": 0, "ytick.major.size": 0}
    with mpl.rc_context(style):
        yield Figure(figsize=(_WIDTH, height), layout="constrained", facecolor=PAPER)
