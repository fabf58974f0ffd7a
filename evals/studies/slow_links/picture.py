"""Held-out loss against time, for each task and link."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hipp_ext.evals.studies.slow_links.methods import METHODS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#22262b", "#c44e52", "#5b7fc7", "#5b7fc7", "#8fa5d6", "#9aa0a6", "#8d7cc0")


def picture(tasks: Mapping[str, Any]) -> "Figure":
    """A row for each task, a panel for each limit: the loss of every method with its standard
    error, and the steps that it took.

    Args:
        tasks: task -> what `TaskStudy.measure` returned.
    """
    from matplotlib.figure import Figure

    columns = max(len(found["limits"]) for found in tasks.values())
    figure = Figure(figsize=(1.8 + 3.1 * columns, 0.6 + 2.6 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), columns, squeeze=False, sharey=True)
    for line, (task, found) in zip(grid, tasks.items(), strict=True):
        for axes, (limit, rows) in zip(line, found["limits"].items(), strict=True):
            _panel(axes, rows, found["loss before"])
            axes.set_title(f"{task}: {limit}", loc="left", fontsize=10, weight="bold")
    figure.supxlabel("loss on held-out rows [nats per token]; dotted: before training", fontsize=9)
    return figure


def _panel(axes: Any, rows: Mapping[str, Any], before: float) -> None:
    names = list(METHODS)[::-1]
    for place, (name, colour) in enumerate(zip(names, COLOURS[::-1], strict=True)):
        loss = rows[name]["loss"]
        axes.errorbar(loss["mean"], place, xerr=loss["se"] or None, fmt="o", color=colour, lw=2)
        axes.annotate(
            f"{rows[name]['steps']} steps",
            (0.99, place),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="center",
            fontsize=8,
        )
    axes.axvline(before, color="#22262b", lw=0.8, ls=":")
    axes.set_yticks(range(len(names)), names)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.35 * (high - low))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
