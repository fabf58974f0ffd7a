"""What every arm comes to, against dense."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hipp_ext.evals.studies.recovery.cells import ARMS, BASE
from hipp_ext.evals.studies.recovery.table import COMPARED, in_units, title_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RED, INK, GREY = "#c44e52", "#22262b", "#9aa0a6"


def picture(tasks: Mapping[str, Any]) -> "Figure":
    """A row for each measure of a task, a column for each of its ratios; in it a point for every
    arm and seed, and lines for dense and for the model before recovery.

    Args:
        tasks: task -> its summary.
    """
    from matplotlib.figure import Figure

    rows = [(name, m) for name, found in tasks.items() for m in COMPARED if m in found["dense"]]
    columns = max((len(found["ratios"]) for found in tasks.values()), default=0)
    figure = Figure(figsize=(1.5 + 3.2 * columns, 0.6 + 1.8 * len(rows)), layout="constrained")
    grid = figure.subplots(max(1, len(rows)), max(1, columns), squeeze=False)
    for axes in grid.flatten():
        axes.set_visible(False)
    for (name, measure), line in zip(rows, grid, strict=False):
        arms = _arms_of(tasks[name])
        for axes, (ratio, own) in zip(line, tasks[name]["ratios"].items(), strict=False):
            axes.set_visible(True)
            _panel(axes, tasks[name]["dense"], own, measure, arms)
            axes.tick_params(labelleft=axes is line[0])
            title = f"{name} {ratio}: {title_of(measure)}"
            axes.set_title(title, loc="left", fontsize=9, weight="bold")
    figure.supxlabel("solid line: dense; dotted: the reconstructed model before it", fontsize=9)
    return figure


def _arms_of(found: Mapping[str, Any]) -> list[str]:
    """The arms of a task at any of its ratios, in their order."""
    return [arm for arm in ARMS if any(arm in own["arms"] for own in found["ratios"].values())]


def _panel(
    axes: Any, dense: Mapping[str, Any], found: Mapping[str, Any], measure: str, arms: list[str]
) -> None:
    unit, names = in_units(measure), arms[::-1]
    for place, arm in enumerate(names):
        if arm not in found["arms"]:
            continue
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
