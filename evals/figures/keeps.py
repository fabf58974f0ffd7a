"""What plans keep of every layer, one strip of bars per plan."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hipp_ext.evals.figures.style import FAINT, SMALL, Mark, drawing, label, marks
from hipp_ext.kinds import KINDS
from hipp_ext.plan import PruningPlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STRIP = 0.5  # height of a plan [inches]
_BAR = 0.6  # height of a bar, of which a plan's height is 1
_COUNTED = 12  # layers; with more there is no room for the numbers of units


def keeps_figure(
    plans: Mapping[str, PruningPlan],
    visual: Mapping[str, Sequence[float]] | None = None,
    *,
    models: Sequence[str] = (),
) -> "Figure":
    """Share of units kept per layer, one strip per plan, with the visual sensitivity of each layer
    below.

    Args:
        plans: plans by name; at least one must have a group in the language model. A kind without
            groups is left out.
        visual: visual sensitivity of each layer for every kind that has it; None to leave it out.
        models: names of the models of all figures, the dense one first; they tell the colours.
    """
    looks = marks([*(models or [""]), *plans])
    kinds = [kind for kind in KINDS if any(_language(plan, kind) for plan in plans.values())]
    shown = {k: {n: row for n, p in plans.items() if (row := _language(p, k))} for k in kinds}
    heights = []
    for kind in kinds:
        heights += [_STRIP * len(shown[kind]) + 0.1] + [0.8] * _has(visual, kind)
    with drawing(sum(heights) + 0.75 * len(kinds)) as figure:
        grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
        place = 0
        for kind in kinds:
            axes = figure.add_subplot(grid[place])
            _strips(axes, shown[kind], kind, looks)
            place += 1
            if visual and _has(visual, kind):
                _bars_below(figure.add_subplot(grid[place], sharex=axes), visual[kind], kind)
                place += 1
    return figure


def _has(visual: Mapping[str, Sequence[float]] | None, kind: str) -> bool:
    return bool(visual and visual.get(kind))


def _language(plan: PruningPlan, kind: str) -> list[Any]:
    return [g for g in plan.groups if g.kind == kind and g.tower == "language"]


def _strips(
    axes: Any, rows: Mapping[str, Sequence[Any]], kind: str, looks: Mapping[str, Mark]
) -> None:
    """A bar per layer: its frame is all units, its filling those that stay."""
    places, longest = [], 0
    for number, (name, row) in enumerate(rows.items()):
        x, bottom = range(len(row)), -float(number)
        axes.bar(x, _BAR, 0.82, bottom=bottom, color="none", edgecolor=FAINT, linewidth=0.8)
        kept = [_BAR * g.keep / g.width for g in row]
        axes.bar(x, kept, 0.82, bottom=bottom, color=looks[name].colour)
        places.append(bottom + _BAR / 2)
        longest = max(longest, len(row))
        for i, g in enumerate(row if len(row) <= _COUNTED else ()):
            axes.text(i, bottom - 0.04, str(g.keep), ha="center", va="top", fontsize=SMALL)
    width = next(iter(rows.values()))[0].width
    axes.set_title(f"{kind}, of {width} {KINDS[kind].unit}")
    axes.set_yticks(places, [label(name) for name in rows])
    axes.set_ylim(0.4 - len(rows), 0.7)
    axes.set_xticks(range(0, longest, max(1, longest // 8)))
    axes.set_xlabel("layer")
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)


def _bars_below(axes: Any, values: Sequence[float], kind: str) -> None:
    axes.bar(range(len(values)), values, width=0.82, color=FAINT)
    flow = KINDS[kind].place == "attention"
    axes.set_title("visual flow" if flow else "visual drift", fontsize=SMALL)
    axes.set_xlabel("layer")
    axes.grid(axis="x", visible=False)
