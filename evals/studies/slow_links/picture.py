"""Held-out loss against time, for each task and link."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hipp_ext.evals.studies.slow_links.methods import METHODS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#9aa0a6", "#c44e52", "#5b7fc7", "#5b7fc7", "#a9bbe0", "#cfd4da", "#8d7cc0")


def picture(tasks: Mapping[str, Any]) -> "Figure":
    """A panel for each task and limit: the loss of every method, with its standard error.

    Args:
        tasks: task -> what `TaskStudy.measure` returned.
    """
    from matplotlib.figure import Figure

    panels = [(task, name) for task, found in tasks.items() for name in found["limits"]]
    figure = Figure(figsize=(9.5, 2.6 * -(-len(panels) // 2)), layout="constrained")
    grid = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, (task, limit) in zip(grid, panels, strict=False):
        rows = tasks[task]["limits"][limit]
        names = list(METHODS)[::-1]
        axes.barh(
            names,
            [rows[name]["loss"]["mean"] for name in names],
            xerr=[rows[name]["loss"]["se"] or 0.0 for name in names],
            color=COLOURS[::-1],
            height=0.7,
        )
        for place, name in enumerate(names):
            label = f" {rows[name]['loss']['mean']:.3f}, {rows[name]['steps']} steps"
            axes.annotate(label, (rows[name]["loss"]["mean"], place), va="center", fontsize=8)
        axes.axvline(tasks[task]["loss before"], color="#22262b", lw=0.8, ls=":")
        axes.set_title(f"{task}: {limit}", loc="left", fontsize=10, weight="bold")
        axes.margins(x=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.supxlabel("loss on held-out rows [nats per token]; dotted: before training", fontsize=9)
    return figure
