"""Perplexity against the removed fraction, as a README can show it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hipp_ext.evals.studies.real_lm.methods import HIPP

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RED, INK, FAINT = "#c44e52", "#22262b", "#d9dde2"
# Method -> label, colour and line style; the others of the study are in the table.
SHOWN = {
    "torch-pruning": ("torch-pruning", "#9aa0a6", ":"),
    "uniform, Magnitude": ("uniform, magnitude", "#9aa0a6", "--"),
    "uniform, WandaSP": ("uniform, Wanda-sp", "#8d7cc0", "-"),
    "OWL": ("OWL", "#5b7fc7", "--"),
    "FLAP adaptive": ("FLAP", "#5b7fc7", "-"),
    "ShortGPT": ("ShortGPT", "#55a868", "-"),
    HIPP: ("hipp-ext", RED, "-"),
}
TOP = 100  # times the dense perplexity; what is above leaves the picture
GAP = 0.045  # least distance of two labels, of the picture's height


@dataclass(frozen=True, kw_only=True)
class _Line:
    """Points of a method: removed [%] and perplexity, with the standard error over draws."""

    name: str
    points: Sequence[tuple[float, float, float]]


def picture(result: Mapping[str, Any]) -> "Figure":
    """One line per method: the better of its two sides at each ratio, with or without least squares.

    Args:
        result: what `summarize` returned.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    dense = result["dense"]
    lines = [
        _Line(name=name, points=[(0.0, dense, 0.0), *_best(result["methods"][name])])
        for name in SHOWN
        if name in result["methods"]
    ]
    style: dict[Any, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style | {"axes.edgecolor": "#9aa0a6", "text.color": INK}):
        figure = Figure(figsize=(7.6, 4.4), layout="constrained", facecolor="white")
        axes = figure.subplots()
        axes.set_yscale("log")
        axes.set_ylim(dense * 0.85, dense * TOP)
        axes.set_xlim(0, 100 * _widest(lines))
        axes.grid(axis="y", color=FAINT, lw=0.6)
        for line in lines:
            _, colour, dashes = SHOWN[line.name]
            bold = line.name == HIPP
            x, y, errors = zip(*line.points, strict=True)
            axes.errorbar(
                x,
                y,
                yerr=errors,
                color=colour,
                ls=dashes,
                lw=3 if bold else 1.4,
                marker="o",
                ms=6 if bold else 3.5,
                capsize=2,
                zorder=4 if bold else 3,
            )
        _label(axes, lines, dense)
    return figure


def _best(row: Mapping[str, Any]) -> list[tuple[float, float, float]]:
    cells: dict[float, list[Any]] = {}
    for side in ("sliced", "reconstructed"):
        for ratio, cell in row[side].items():
            cells.setdefault(float(ratio), []).append(cell)
    best = {ratio: min(own, key=lambda c: c["mean"]) for ratio, own in sorted(cells.items())}
    return [(100 * ratio, c["mean"], c["se"] or 0.0) for ratio, c in best.items()]


def _widest(lines: Sequence[_Line]) -> float:
    return max((line.points[-1][0] for line in lines), default=40) / 100


def _label(axes: Any, lines: Sequence[_Line], dense: float) -> None:
    pass
