"""Figures for reports: the front, keep counts per layer, POPE by split, cost. matplotlib, no global
state.

A figure is drawn once, as wide as a phone can show it, with its panels below each other. As an SVG
element it takes the colours of the page that holds it, so it fits light and dark pages.
"""

import contextlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hipp_ext.evals.pope import SPLITS
from hipp_ext.files.untrusted import shown
from hipp_ext.kinds import KINDS
from hipp_ext.plan import PruningPlan
from hipp_ext.planner.reward import Reward

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#5b7fc7", "#dd8452", "#55a868", "#c9545a", "#8d7cc0", "#a3826b")
INK, FAINT, PAPER = "#22262b", "#cfd4da", "#ffffff"  # text and axes; grids and frames; background
_PAGE_COLOURS = {INK: "currentColor", FAINT: "var(--line)", PAPER: "var(--card)"}
_WIDTH = 5.0  # [inches]; on a phone, 340 pixels wide, a letter of 9 points has 8.5 pixels
_LONGEST_NAME = 40  # name in a figure [characters]


def front_figure(
    evaluated: Sequence[Reward], front: Sequence[Reward], chosen: Mapping[str, Reward]
) -> "Figure":
    """Utility against robustness of every evaluated plan, coloured by the share of parameters
    removed.

    Args:
        evaluated: rewards of all plans of a fit.
        front: rewards of the non-dominated ones, which get a ring and their standard errors.
        chosen: rewards of chosen plans by name, which get a star.
    """
    with _drawing(4.4) as figure:
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
            ecolor=INK,
            elinewidth=0.6,
            alpha=0.45,
        )
        axes.scatter(
            [r.utility for r in front],
            [r.robustness for r in front],
            s=48,
            facecolors="none",
            edgecolors=INK,
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
                edgecolors=PAPER,
                label=label(name),
            )
        _colorbar(figure, points, "parameters removed [%]")
        axes.set_xlabel("utility (ScienceQA margin over guessing)")
        axes.set_ylabel("robustness (POPE margin over guessing)")
        _legend(figure, axes)
    return figure


def keeps_figure(
    plans: Mapping[str, PruningPlan], visual: Mapping[str, Sequence[float]] | None = None
) -> "Figure":
    """Share of units kept per layer, one row per plan, with the visual sensitivity of each layer
    below.

    Args:
        plans: plans by name; at least one must have a group in the language model. A kind without
            groups is left out.
        visual: visual sensitivity of each layer for every kind that has it; None to leave it out.
    """
    kinds = [kind for kind in KINDS if any(_language(plan, kind) for plan in plans.values())]
    height = max(0.42 * len(plans), 0.6)
    heights = [height, 1.0] if visual else [height]
    with _drawing((0.9 + sum(heights)) * len(kinds)) as figure:
        grid = figure.add_gridspec(len(heights) * len(kinds), 1, height_ratios=heights * len(kinds))
        for place, kind in enumerate(kinds):
            top = len(heights) * place
            axes = figure.add_subplot(grid[top])
            image = _heatmap(axes, plans, kind)
            if visual and kind in visual:
                _bars_below(figure.add_subplot(grid[top + 1], sharex=axes), visual[kind], kind)
        _colorbar(figure, image, "fraction kept", ax=figure.axes)
    return figure


def _language(plan: PruningPlan, kind: str) -> list[Any]:
    return [g for g in plan.groups if g.kind == kind and g.tower == "language"]


def _heatmap(axes: Any, plans: Mapping[str, PruningPlan], kind: str) -> Any:
    shown = {name: row for name, plan in plans.items() if (row := _language(plan, kind))}
    rows = list(shown.values())
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
                fontsize=8 if len(row) <= 8 else 6,
                color="#fafafa" if g.keep / g.width > 0.6 else "#222222",
            )
    axes.set_title(f"{kind}, of {rows[0][0].width} {KINDS[kind].unit}", fontsize=10)
    axes.set_xticks(range(0, len(rows[0]), max(1, len(rows[0]) // 12)))
    axes.set_yticks(range(len(rows)), [label(name) for name in shown])
    axes.grid(False)
    return image


def _bars_below(axes: Any, values: Sequence[float], kind: str) -> None:
    axes.bar(range(len(values)), values, width=0.82, color=COLOURS[1])
    axes.set_ylabel(
        "visual flow" if KINDS[kind].place == "attention" else "visual drift", fontsize=8
    )
    axes.set_xlabel("layer")
    axes.tick_params(axis="y", labelsize=7)


def pope_figure(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> "Figure":
    """POPE accuracy by split with standard errors, and the share of the answers yes.

    Args:
        scores: fields of `POPEScores` in percent, by model name and split.
    """
    panels = (("accuracy", "accuracy [%]"), ("yes_rate", 'answers "yes" [%]'))
    with _drawing(5.2) as figure:
        for number, (metric, title) in enumerate(panels):
            axes = figure.add_subplot(2, 1, number + 1)
            width = 0.8 / max(len(scores), 1)
            for i, (name, splits) in enumerate(scores.items()):
                asked = [(s, splits[split]) for s, split in enumerate(SPLITS) if split in splits]
                x = [s + (i - (len(scores) - 1) / 2) * width for s, _ in asked]
                axes.bar(
                    x,
                    [own[metric] for _, own in asked],
                    0.92 * width,
                    yerr=[own[f"{metric}_se"] or 0 for _, own in asked],
                    **_bar_style(i, name),
                )
            axes.axhline(50, color=INK, lw=0.8, ls=":")
            axes.set_xticks(range(len(SPLITS)), SPLITS)
            axes.set_ylabel(title)
            axes.set_ylim(0, 105)
            axes.grid(axis="x", visible=False)
        _legend(figure, figure.axes[0])
    return figure


def cost_figure(shares: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> "Figure":
    """Costs of each model in percent of the first one, with the quartiles of measured quantities.

    Args:
        shares: (value, lower quartile, upper quartile) in percent, by quantity and model name.
    """
    models = list(next(iter(shares.values())))
    quantities = list(shares)[::-1]
    with _drawing(1.0 + 0.22 * len(models) * len(shares)) as figure:
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
                y, [value for value, _, _ in own], 0.9 * width, xerr=errors, **_bar_style(i, name)
            )
        axes.axvline(100, color=INK, lw=0.8, ls=":")
        axes.set_yticks(range(len(quantities)), quantities)
        axes.set_xlabel(f"percent of {label(models[0])}")
        axes.grid(axis="y", visible=False)
        _legend(figure, axes)
    return figure


def _bar_style(number: int, name: str) -> dict[str, Any]:
    """Arguments of matplotlib for the bars of one model."""
    errors = {"lw": 0.9, "ecolor": INK}
    colour = COLOURS[number % len(COLOURS)]
    return {"color": colour, "label": label(name), "error_kw": errors, "capsize": 2}


def label(name: str) -> str:
    """A short name for a figure. Matplotlib would read $ as mathematics and hide names that start
    with _.
    """
    text = shown(name, _LONGEST_NAME).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def png(figure: "Figure", dpi: int = 200) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def svg(figure: "Figure") -> str:
    """The figure as an SVG element for an HTML page.

    Its text takes the page's font and colour; frames and background take the CSS variables `--line`
    and `--card`. Matplotlib escapes every text in it.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    absent = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hipp-ext"}):
        figure.savefig(buffer, format="svg", dpi=200, metadata=absent)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # A page has one namespace of ids and one of styles, for all of its figures.
    text = re.sub(
        r' xmlns(:xlink)?="[^"]*"|<defs>\s*<style.*?</style>\s*</defs>', "", text, flags=re.S
    )
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for colour, page_colour in _PAGE_COLOURS.items():
        text = re.sub(f"(fill|stroke): {colour}", rf"\1: {page_colour}", text)
    return text


def _legend(figure: "Figure", axes: Any) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=3, fontsize=8, frameon=False)


def _colorbar(figure: "Figure", image: Any, title: str, **options: Any) -> None:
    bar = figure.colorbar(
        image, label=title, location="bottom", pad=0.02, aspect=40, fraction=0.03, **options
    )
    bar.outline.set_visible(False)


@contextlib.contextmanager
def _drawing(height: float) -> Iterator["Figure"]:
    """A figure of `height` [inches]; what is drawn in the block takes its style."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    )
    style |= {"axes.edgecolor": FAINT, "grid.color": FAINT, "grid.alpha": 0.5}
    style |= {"axes.facecolor": PAPER, "axes.grid": True, "axes.axisbelow": True}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    style |= {"font.size": 9, "xtick.major.size": 0, "ytick.major.size": 0, "grid.linewidth": 0.6}
    with mpl.rc_context(style):
        yield Figure(figsize=(_WIDTH, height), layout="constrained", facecolor=PAPER)
