"""What the plans of a fit reach: the two scores against the size."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hipp_ext.evals.figures.style import FAINT, INK, PAPER, Mark, drawing, label, legend, marks
from hipp_ext.planner.reward import Reward

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = ("utility", "robustness")


def front_figure(
    evaluated: Sequence[Reward],
    front: Sequence[Reward],
    chosen: Mapping[str, Reward],
    *,
    sizes: Mapping[str, float] | None = None,
    models: Sequence[str] = (),
) -> "Figure":
    """Utility, and below it robustness, of every evaluated plan against what it removes.

    Args:
        evaluated: rewards of all plans of a fit.
        front: rewards of the non-dominated ones, which get a ring and their standard errors.
        chosen: rewards of chosen plans by name, which get a star.
        sizes: compression of plans by name whose scores are not known; each gets a dotted line.
        models: names of the models of all figures, the dense one first; they tell the colours.
    """
    sizes = sizes or {}
    looks = marks([*(models or [""]), *chosen, *sizes])
    with drawing(5.2) as figure:
        panels = figure.subplots(2, 1, sharex=True)
        for axes, name in zip(panels, _PANELS, strict=True):
            _panel(axes, name, evaluated, front)
            for model, reward in chosen.items():
                _star(axes, name, model, reward, looks[model])
            for model, compression in sizes.items():
                axes.axvline(
                    100 * compression, color=looks[model].colour, ls=":", lw=1.4, label=label(model)
                )
            axes.set_ylabel(f"{name} (1: no error)")
        panels[-1].set_xlabel("removed [%]")
        legend(figure, panels[0])
    return figure


def _panel(axes: Any, name: str, evaluated: Sequence[Reward], front: Sequence[Reward]) -> None:
    axes.scatter(
        [100 * r.compression for r in evaluated],
        [getattr(r, name) for r in evaluated],
        s=14,
        color=FAINT,
        edgecolors=INK,
        linewidths=0.3,
        label="evaluated",
    )
    x, y = [100 * r.compression for r in front], [getattr(r, name) for r in front]
    errors = [getattr(r, f"{name}_se") for r in front]
    axes.errorbar(x, y, yerr=errors, fmt="none", ecolor=INK, elinewidth=0.6, alpha=0.5)
    axes.scatter(x, y, s=42, facecolors="none", edgecolors=INK, linewidths=0.9, label="front ± SE")


def _star(axes: Any, name: str, model: str, reward: Reward, mark: Mark) -> None:
    axes.scatter(
        100 * reward.compression,
        getattr(reward, name),
        marker="*",
        s=230,
        color=mark.colour,
        edgecolors=PAPER,
        linewidths=1.2,
        label=label(model),
        zorder=3,
    )
