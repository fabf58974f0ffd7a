"""What every arm comes to, against dense."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hipp_ext.evals.studies.recovery.cells import ARMS, BASE
from hipp_ext.evals.studies.recovery.table import COMPARED, in_units, title_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RED, INK, GREY = "#c44e52", "#22262b", "#9aa0a6"


def picture(tasks: Mapping[str, Any]) -> "Figure":
    """A panel for each measure and ratio: a point for every arm and seed, and lines for dense and
    for the model before recovery.

    Args:
        tasks: task -> its summary.
    """
    from matplotlib.figure import Figure

    panels = [
        (task, ratio, measure)
        for task, found in tasks.items()
        for measure in COMPARED
        if measure in found["dense"]
        for ratio in found["ratios"]
    ]
    rows = max(1, -(-len(panels) // 2))
    figure = Figure(figsize=(9.5, 2.2 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, (task, ratio, measure) in zip(grid, panels, strict=False):
        _panel(axes, tasks[task]["dense"], tasks[task]["ratios"][ratio], measure)
        title = f"{task} {ratio}: {title_of(measure)}"
        axes.set_title(title, loc="left", fontsize=10, weight="bold")
    figure.supxlabel("solid line: dense; dotted: the reconstructed model before it", fontsize=9)
    return figure


def _panel(axes: Any, dense: Mapping[str, Any], found: Mapping[str, Any], measure: str) -> None:
    unit = in_units(measure)
    names = [arm for arm in ARMS if arm in found["arms"]][::-1]
    for place, arm in enumerate(names):
        row, color = found["arms"][arm][measure], RED if arm == BASE else GREY
        low, high = (unit(row["mean"] + sign * row["se"]) for sign in (-1, 1))
        axes.plot([low, high], [place, place], color=color, lw=2)
        points = [unit(value) for value in row["values"]]
        axes.plot(points, [place] * len(points), "o", color=color, ms=4)
    axes.axvline(unit(dense[measure]["mean"]), color=INK, lw=0.8)
    if "reconstructed" in found["before"]:
        before = unit(found["before"]["reconstructed"][measure]["mean"])
        axes.axvline(before, color=INK, lw=0.8, ls=":")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
