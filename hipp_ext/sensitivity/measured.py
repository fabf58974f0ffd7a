"""Measured sensitivity: the KL divergence of the answers when one group is pruned alone."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hipp_ext.answers import AnswerLogits
from hipp_ext.budget import Bounds
from hipp_ext.calibration import TASKS, Calibration, CalibrationLike
from hipp_ext.groups import Group, gated
from hipp_ext.progress import Tick
from hipp_ext.units import check_scores, unit_order
from hipp_ext.verification import verify_groups

PRUNE_LEVELS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)  # removed fractions of a group's units
DROP_LEVELS = (*PRUNE_LEVELS, 1.0)  # and the block dropped


def levels_for(bounds: Bounds) -> tuple[float, ...]:
    """The levels that an allocation within `bounds` needs."""
    return PRUNE_LEVELS if bounds.drop == "none" else DROP_LEVELS


def measure_sensitivity(
    model: nn.Module,
    calibration: CalibrationLike,
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    tick: Tick = lambda done, total: None,
    *,
    levels: Sequence[float] = PRUNE_LEVELS,
) -> Float[Tensor, "tasks groups levels"]:
    """Mean KL [nats] of each task's answers from dense when one group loses its lowest units.

    It is measured for one group after the other. A group of one unit can only be dropped; at other
    levels it gets the median of the others as a neutral value.

    Args:
        model: masked while it is measured, otherwise left as it was found.
        calibration: a Calibration, or batches by task.
        groups: groups to be pruned.
        scores: group name -> score per unit, higher = keep.
        tick: called with (measured, all) after each group.
        levels: removed fractions of a group's units; 1 drops the block.
    """
    check_scores(groups, scores)
    verify_groups(model, groups)
    given = Calibration.of(model, calibration)
    answers = AnswerLogits(model, given.batches)
    dense = answers(model).log_softmax(-1)
    rows = _rows_of_tasks(given)
    result = torch.zeros(len(TASKS), len(groups), len(levels))
    prunable = [i for i, g in enumerate(groups) if g.width > 1 or 1 in levels]
    for number, i in enumerate(prunable, 1):
        group, known = groups[i], {}
        width, order = group.width, unit_order(scores[group.name])
        for j, level in enumerate(levels):
            keep = 0 if level == 1 else max(1, min(width - 1, round(width * (1 - level))))
            if keep == width:  # it has one unit
                continue
            if keep not in known:
                mask = torch.zeros(width, dtype=torch.bool)
                mask[order[:keep]] = True
                each = divergence(model, {group: mask}, answers, dense)
                means = torch.stack([each[of_task].mean() for of_task in rows])
                known[keep] = means.clamp_min(0)
            # Few units cannot lose exactly a quarter: scale the measured KL to the level.
            result[:, i, j] = known[keep] * (level / (1 - keep / width)) ** 2
        tick(number, len(prunable))
    several = [i for i, g in enumerate(groups) if g.width > 1]
    single = [i for i, g in enumerate(groups) if g.width == 1]
    for j, level in enumerate(levels):
        if several and single and level < 1:
            result[:, single, j] = result[:, several, j].median(1, keepdim=True).values
    return result


def divergence(
    model: nn.Module,
    masks: Mapping[Group, Bool[Tensor, " width"]],
    answers: AnswerLogits,
    dense: Float[Tensor, "rows vocabulary"],
) -> Float[Tensor, " rows"]:
    """KL [nats] of every row's answer, with some units masked, from the dense model's.

    Args:
        model: masked for the measurement.
        masks: keep mask of each group that loses units.
        answers: reader of the answers of the calibration rows.
        dense: log probabilities of the dense model's answers.
    """
    with gated(model, masks):
        pruned = answers(model).log_softmax(-1)
    return (dense.exp() * (dense - pruned)).sum(-1)


def _rows_of_tasks(calibration: Calibration) -> list[Tensor]:
    """For each task, a mask of the rows of `calibration.batches` that are its own."""
    owners = [{id(batch) for batch in calibration.by_task[task]} for task in TASKS]
    return [
        torch.tensor([id(b) in owner for b in calibration.batches for _ in b["input_ids"]])
        for owner in owners
    ]
