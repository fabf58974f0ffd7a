"""Sensitivity of all groups at all levels, by an effort: Fisher, anchored or measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.calibration import TASKS, Calibration, CalibrationLike
from hipp_ext.errors import BudgetError
from hipp_ext.groups import Group, tower_layers
from hipp_ext.modes import evaluating
from hipp_ext.progress import counting
from hipp_ext.sensitivity.anchors import MEASURED_LEVELS, PASSES, affordable, passes_of, points_at
from hipp_ext.sensitivity.curves import at_levels, loss_curve
from hipp_ext.sensitivity.fisher import fisher_curve, unit_contributions
from hipp_ext.sensitivity.measured import Point, measure_points
from hipp_ext.sensitivity.replay import CalibrationReplay, ReplayBatch
from hipp_ext.steps import NOTHING_KEPT, Steps
from hipp_ext.units import check_scores
from hipp_ext.verification import verify_groups

Effort = Literal["fisher", "anchored", "measured"]
# Called before anything is measured, with the calibration and the forward passes over it that this
# will take, in FLOPs.
Announce = Callable[[Calibration, float], None]
FISHER_PASSES = 3.0  # a forward and a backward pass; 2 where all activations are kept


def check_effort(effort: object) -> None:
    """Raise BudgetError unless `effort` is one."""
    if effort not in get_args(Effort):
        raise BudgetError(f"effort={effort!r}: one of {', '.join(get_args(Effort))} is needed.")


def forward_passes(groups: Sequence[Group], layers: int, effort: Effort) -> float:
    """Forward passes over the calibration that `measure_sensitivity` costs, in FLOPs.

    Args:
        groups: the groups.
        layers: layers of the language tower.
        effort: how much is measured.
    """
    check_effort(effort)
    if effort == "measured":
        return FISHER_PASSES + passes_of(points_at(groups, MEASURED_LEVELS), layers)
    anchors = {level: passes_of(points_at(groups, [level]), layers) for level in PASSES}
    anchored = sum(min(PASSES[level], cost) for level, cost in anchors.items())
    return FISHER_PASSES + (anchored if effort == "anchored" else 0.0)


def measure_sensitivity(
    model: nn.Module,
    calibration: CalibrationLike,
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    *,
    effort: Effort = "anchored",
    seed: int = 0,
    progress: bool = False,
    steps: Steps = NOTHING_KEPT,
) -> Float[Tensor, "tasks groups levels"]:
    """Mean KL [nats per counted position] from dense when one group loses its lowest units.

    Levels are LEVELS: removed fractions of a group's units; at 1 the block is dropped. Which
    positions count is what `counted_positions` says. Efforts, with their cost in forward passes
    over the calibration:

    - "fisher": second-order estimates from one backward pass; 2 passes, 3 where memory is short.
    - "anchored": also two measured points of each group, on as many rows as 7.5 passes allow.
    - "measured": five measured levels of each group, on all rows; 2.5 passes for each group.

    How estimates and measurements make a curve is what `loss_curve` says.

    Args:
        model: masked while it is measured, otherwise left as it was found.
        calibration: a Calibration, or batches by task.
        groups: groups of any towers. Those before the language tower are measured by what the
            language tower answers; there "fisher" alone may miss at how many units the answers
            break down.
        scores: group name -> score per unit, higher = keep.
        effort: how much is measured.
        seed: random seed of the Fisher estimate.
        progress: show on stderr what is measured, and how long it will take.
        steps: where what is finished is kept, and found if an interrupted run left it.

    Raises:
        BudgetError: the effort is unknown.
        UnsupportedModelError: groups do not do what pruning takes them for, weights are offloaded,
            or the model computes its logits in an unknown way.
    """
    check_effort(effort)
    check_scores(groups, scores)
    verify_groups(model, groups)
    with evaluating(model):
        whole = any(g.tower != "language" for g in groups)
        replay = CalibrationReplay(model, Calibration.of(model, calibration), whole)
        with counting(progress, "sensitivity by a backward pass, batch") as tick:
            found = unit_contributions(model, replay, groups, seed=seed, tick=tick, steps=steps)
        estimates = [
            replay.by_task(fisher_curve(found.pop(g.name), scores[g.name], g.sections))
            for g in groups
        ]
        known: dict[Group, list[dict[int, float]]] = {g: [{} for _ in TASKS] for g in groups}
        for number, (points, rows) in enumerate(_measurements(model, replay, groups, effort)):
            name = f"points-{number}"
            with counting(progress, "measuring sensitivity, point") as tick:
                measured = measure_points(model, replay, points, scores, rows, tick, steps, name)
            for point, values in zip(points, measured.tolist(), strict=True):
                for task, value in enumerate(values):
                    known[point.group][task][point.removed // point.group.sections] = value
    curves = [
        torch.stack([at_levels(loss_curve(*pair)) for pair in zip(estimate, known[g], strict=True)])
        for g, estimate in zip(groups, estimates, strict=True)
    ]
    return torch.stack(curves, 1)


def _measurements(
    model: nn.Module, replay: CalibrationReplay, groups: Sequence[Group], effort: Effort
) -> Iterator[tuple[list[Point], tuple[ReplayBatch, ...]]]:
    """What an effort measures, and on which rows."""
    if effort == "measured":
        yield points_at(groups, MEASURED_LEVELS), replay.batches
    elif effort == "anchored":
        layers = len(tower_layers(model, "language"))
        for level, passes in PASSES.items():
            points = points_at(groups, [level])
            yield points, replay.sample(affordable(points, layers, passes))
