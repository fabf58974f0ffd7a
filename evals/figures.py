"""Pictures for reports and README: the front, keep counts per layer, POPE by split, cost. matplotlib, no global state."""

import contextlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hipp_ext.files.untrusted import shown
from hipp_ext.plan import PruningPlan
from hipp_ext.planner.reward import Reward

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#5b7fc7", "#dd8452", "#55a868", "#c9545a", "#8d7cc0", "#a3826b")
SPLITS = ("random", "popular", "adversarial")
KINDS = ("attention", "ffn")
_LONGEST = 40  # name in a figure [characters]


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a picture is drawn.

    Attributes:
        dark: light ink on dark paper.
        narrow: for a phone: panels below each other.
    """

    dark: bool = False
    narrow: bool = False

    @property
    def ink(self) -> str:
        """Colour of text and axes."""
        return "#e4e6ea" if self.dark else "#22262b"

    @property
    def faint(self) -> str:
        """Colour of grids and frames."""
        return "#4a5058" if self.dark else "#cfd4da"

    @property
    def paper(self) -> str:
        """Colour of the background."""
        return "#1d2024" if self.dark else "#ffffff"


LIGHT = Look()


def front_figure(
    evaluated: Sequence[Reward],
    front: Sequence[Reward],
    chosen: Mapping[str, Reward],
    look: Look = LIGHT,
) -> "Figure":
    """Utility against robustness of every evaluated plan, coloured by what was removed; the front ringed, with
    standard errors where there are some; choices named.

    Args:
        evaluated: all plans of a fit.
        front: the non-dominated ones among them.
        chosen: name -> reward of the plans that were taken.
        look: how to draw it.
    """
    with _drawing(look, (7.6, 4.6), (3.7, 4.3)) as figure:
        axes = figure.add_subplot()
        points = axes.scatter(
            [r.utility for r in evaluated],
            [r.robustness for r in evaluated],
            c=[100 * r.compression for r in evaluated],
            s=16,
            cmap="viridis",
            alpha=0.8,
            label="evaluated",
            linewidths=0,
        )
        axes.errorbar(
            [r.utility for r in front],
            [r.robustness for r in front],
            xerr=[r.utility_se for r in front],
            yerr=[r.robustness_se for r in front],
            fmt="none",
            ecolor=look.ink,
            elinewidth=0.6,
            alpha=0.45,
        )
        axes.scatter(
            [r.utility for r in front],
            [r.robustness for r in front],
            s=48,
            facecolors="none",
            edgecolors=look.ink,
            linewidths=0.8,
            label="front ± SE",
        )
        for colour, (name, reward) in zip(COLOURS[1:], chosen.items(), strict=False):
            axes.scatter(
                reward.utility,
                reward.robustness,
                marker="*",
                s=210,
                color=colour,
                edgecolors=look.paper,
                label=label(name),
            )
        bar = figure.colorbar(
            points, label="parameters removed [%]", **(_below() if look.narrow else {})
        )
        bar.outline.set_visible(False)
        axes.set_xlabel("utility (ScienceQA margin over guessing)")
        axes.set_ylabel("robustness (POPE margin over guessing)")
        _legend(figure, axes)
    return figure


def keeps_figure(
    plans: Mapping[str, PruningPlan],
    visual: Mapping[str, Sequence[float]] | None = None,
    look: Look = LIGHT,
) -> "Figure":
    """Share of units kept per layer, one row per plan, the counts in the cells; below, each layer's visual sensitivity.

    Args:
        plans: name -> plan.
        visual: "attention" and "ffn" -> visual sensitivity of each layer; None: not drawn.
        look: how to draw it.

    A kind of which the plans have no group in the language model is left out; one at least must be there.
    """
    kinds = [kind for kind in KINDS if any(_language(plan, kind) for plan in plans.values())]
    rows = 0.42 * len(plans)
    tall = (0.9 + rows + (1.4 if visual else 0)) * (len(kinds) if look.narrow else 1)
    with _drawing(look, (8.4, tall), (3.7, tall)) as figure:
        blocks = 2 if visual else 1
        across = 1 if look.narrow else len(kinds)
        heights = [max(rows, 0.6), 1.0][:blocks] * (len(kinds) if look.narrow else 1)
        grid = figure.add_gridspec(len(heights), across, height_ratios=heights)
        for place, kind in enumerate(kinds):
            top, column = (blocks * place, 0) if look.narrow else (0, place)
            axes = figure.add_subplot(grid[top, column])
            image = _heatmap(axes, plans, kind, named=look.narrow or column == 0)
            if visual:
                _bars_below(
                    figure.add_subplot(grid[top + 1, column], sharex=axes), visual[kind], kind, look
                )
        bar = figure.colorbar(
            image,
            ax=figure.axes,
            label="share kept",
            fraction=0.03,
            **(_below() if look.narrow else {}),
        )
        bar.outline.set_visible(False)
    return figure


def _language(plan: PruningPlan, kind: str) -> list[Any]:
    return [g for g in plan.groups if g.kind == kind and g.tower == "language"]


def _heatmap(axes: Any, plans: Mapping[str, PruningPlan], kind: str, *, named: bool) -> Any:
    rows = [_language(plan, kind) for plan in plans.values()]
    image = axes.imshow(
        [[g.keep / g.width for g in row] for row in rows],
        vmin=0,
        vmax=1,
        cmap="Blues",
        aspect="auto",
    )
    for y, row in enumerate(rows):
        for x, g in enumerate(row if len(row) <= 16 else ()):
            axes.text(
                x,
                y,
                str(g.keep),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if g.keep / g.width > 0.6 else "#222222",
            )
    axes.set_title(
        f"{kind}, of {rows[0][0].width} {'KV groups' if kind == 'attention' else 'channels'}",
        fontsize=10,
    )
    axes.set_xticks(range(0, len(rows[0]), max(1, len(rows[0]) // 12)))
    axes.set_yticks(range(len(plans)), [label(name) if named else "" for name in plans])
    axes.grid(False)
    return image


def _bars_below(axes: Any, values: Sequence[float], kind: str, look: Look) -> None:
    axes.bar(range(len(values)), values, width=0.82, color=COLOURS[1])
    axes.set_ylabel("visual flow" if kind == "attention" else "visual drift", fontsize=8)
    axes.set_xlabel("layer")
    axes.tick_params(axis="y", labelsize=7)


def pope_figure(
    scores: Mapping[str, Mapping[str, Mapping[str, float]]], look: Look = LIGHT
) -> "Figure":
    """POPE accuracy by split with standard errors, and the yes-rate; one colour per model.

    Args:
        scores: model name -> split -> fields of `POPEScores` (accuracy, accuracy_se, yes_rate, ...), in percent.
        look: how to draw it.
    """
    panels = (("accuracy", "accuracy [%]"), ("yes_rate", 'answers "yes" [%]'))
    with _drawing(look, (8.4, 3.6), (3.7, 5.4)) as figure:
        for number, (metric, title) in enumerate(panels):
            axes = (
                figure.add_subplot(2, 1, number + 1)
                if look.narrow
                else figure.add_subplot(1, 2, number + 1)
            )
            width = 0.8 / max(len(scores), 1)
            for i, (name, splits) in enumerate(scores.items()):
                asked = [(s, splits[split]) for s, split in enumerate(SPLITS) if split in splits]
                x = [s + (i - (len(scores) - 1) / 2) * width for s, _ in asked]
                axes.bar(
                    x,
                    [own[metric] for _, own in asked],
                    0.92 * width,
                    color=COLOURS[i % len(COLOURS)],
                    label=label(name),
                    yerr=[own[f"{metric}_se"] or 0 for _, own in asked],
                    capsize=2,
                    error_kw={"lw": 0.9, "ecolor": look.ink},
                )
            axes.axhline(50, color=look.ink, lw=0.8, ls=":")
            axes.set_xticks(range(len(SPLITS)), SPLITS)
            axes.set_ylabel(title)
            axes.set_ylim(0, 105)
            axes.grid(axis="x", visible=False)
        _legend(figure, figure.axes[0])
    return figure


def cost_figure(
    shares: Mapping[str, Mapping[str, tuple[float, float, float]]], look: Look = LIGHT
) -> "Figure":
    """What each model costs, in percent of the first one; measured quantities with quartiles.

    Args:
        shares: quantity -> model name -> (value, lower, upper) in percent.
        look: how to draw it.
    """
    models = list(next(iter(shares.values())))
    quantities = list(shares)[::-1]
    with _drawing(
        look,
        (7.6, 0.9 + 0.22 * len(models) * len(shares)),
        (3.7, 1.0 + 0.24 * len(models) * len(shares)),
    ) as figure:
        axes = figure.add_subplot()
        width = 0.8 / len(models)
        for i, name in enumerate(models):
            y = [q - (i - (len(models) - 1) / 2) * width for q in range(len(quantities))]
            own = [shares[quantity][name] for quantity in quantities]
            errors = [
                [value - low or math.nan for value, low, _ in own],
                [high - value or math.nan for value, _, high in own],
            ]
            axes.barh(
                y,
                [value for value, _, _ in own],
                0.9 * width,
                xerr=errors,
                color=COLOURS[i % len(COLOURS)],
                label=label(name),
                error_kw={"lw": 0.9, "ecolor": look.ink},
                capsize=2,
            )
        axes.axvline(100, color=look.ink, lw=0.8, ls=":")
        axes.set_yticks(range(len(quantities)), quantities)
        axes.set_xlabel(f"percent of {label(models[0])}")
        axes.grid(axis="y", visible=False)
        _legend(figure, axes)
    return figure


def label(name: str) -> str:
    """A name as a figure can show it: short, never read as a formula, and never hidden, as matplotlib hides a leading _."""
    text = shown(name, _LONGEST).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def png(figure: "Figure", dpi: int = 144) -> bytes:
    """The figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _legend(figure: "Figure", axes: Any) -> None:
    handles, names = axes.get_legend_handles_labels()
    columns = 3 if figure.get_figwidth() < 6 else 5
    figure.legend(
        handles, names, loc="outside upper left", ncols=columns, fontsize=8, frameon=False
    )


def _below() -> dict[str, Any]:
    return {"location": "bottom", "pad": 0.02, "aspect": 40}


@contextlib.contextmanager
def _drawing(
    look: Look, wide: tuple[float, float], narrow: tuple[float, float]
) -> Iterator["Figure"]:
    """A figure in the look's colours; what is drawn in the block takes them."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), look.ink
    )
    style |= {
        "axes.edgecolor": look.faint,
        "grid.color": look.faint,
        "grid.alpha": 0.5,
        "axes.facecolor": look.paper,
    }
    style |= {
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    style |= {"font.size": 9, "xtick.major.size": 0, "ytick.major.size": 0, "grid.linewidth": 0.6}
    with mpl.rc_context(style):
        yield Figure(
            figsize=narrow if look.narrow else wide, layout="constrained", facecolor=look.paper
        )
