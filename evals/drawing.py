"""Fronts and plans as pictures, which notebooks show and `save` writes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hipp_ext.evals.figures import front_figure, keeps_figure, png
from hipp_ext.files import write_atomic
from hipp_ext.plan import PruningPlan
from hipp_ext.planner import Answers, HiPPPlanner
from hipp_ext.planner.state import Signals
from hipp_ext.scorers import VisualSensitivity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOTEBOOK_DPI = 100


@dataclass(frozen=True, eq=False)
class Drawing:
    """A figure of matplotlib. A notebook shows it where it is the last value of a cell."""

    figure: "Figure"

    def save(self, path: str | Path) -> None:
        """Write it to a PNG file, whole or not at all."""
        write_atomic(path, png(self.figure))

    def _repr_png_(self) -> bytes:
        return png(self.figure, NOTEBOOK_DPI)


def draw_front(planner: HiPPPlanner, answers: Answers | None = None) -> Drawing:
    """The plans that a planner evaluated: utility, robustness, and what they remove.

    Args:
        planner: fitted planner.
        answers: two answers to a preference, which are marked.

    Raises:
        PlanError: the planner was not fitted.
    """
    chosen = {}
    if answers:
        chosen = {"policy": answers.policy.reward, "best evaluated": answers.best_evaluated.reward}
    evaluated = [r.reward for r in planner.archive.measured]
    front = [f.reward for f in planner.front() if f.reward]
    return Drawing(front_figure(evaluated, front, {n: r for n, r in chosen.items() if r}))


def draw_plans(plans: Mapping[str, PruningPlan], signals: Signals | None = None) -> Drawing:
    """The units that plans of one model keep in every layer.

    Args:
        plans: plans by name.
        signals: `HiPPPlanner.signals`; the visual sensitivity of the layers is drawn below.
    """
    return Drawing(keeps_figure(plans, None if signals is None else visual_by_kind(signals)))


def visual_by_kind(signals: Signals) -> dict[str, list[float]] | None:
    """Visual sensitivity of the layers for each kind of group that has it; None if none has."""
    if not float(signals.visual.max()) > 0:
        return None
    pairs = list(zip(signals.groups, signals.visual.tolist(), strict=True))
    kinds = dict.fromkeys(g.kind for g in signals.groups if VisualSensitivity.scores(g))
    return {kind: [value for g, value in pairs if g.kind == kind] for kind in kinds}
