"""Measured sensitivity: the KL divergence of the answers when one group is pruned alone."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.answers import AnswerLogits
from hipp_ext.calibration import TASKS, Batch, Task, all_batches
from hipp_ext.groups import Group
from hipp_ext.plan import PruningPlan
from hipp_ext.progress import Tick
from hipp_ext.surgery.masks import masked
from hipp_ext.units import check_scores, plan_from_counts

PRUNE_LEVELS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)  # removed fractions of a group's units


def measure_sensitivity(
    model: nn.Module,
    tasks: Mapping[Task, Sequence[Batch]],
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    tick: Tick = lambda done, total: None,
) -> Float[Tensor, "tasks groups levels"]:
    """Mean KL [nats] of each task's answers from dense when one group loses its lowest units.

    It is measured at PRUNE_LEVELS, for one group after the other. Groups of one unit cannot be
    measured; they get the median of the others as a neutral value.

    Args:
        model: masked while it is measured, otherwise left as it was found.
        tasks: batches of each task.
        groups: groups to be pruned.
        scores: group name -> score per unit, higher = keep.
        tick: called with (measured, all) after each group.
    """
    check_scores(groups, scores)
    batches = all_batches(tasks)
    answers = AnswerLogits(model, batches)
    dense = answers(model).log_softmax(-1)
    rows = _rows_of_tasks(tasks, batches)
    result = torch.zeros(len(TASKS), len(groups), len(PRUNE_LEVELS))
    several = [i for i, g in enumerate(groups) if g.width > 1]
    for number, i in enumerate(several, 1):
        width, counts, known = groups[i].width, [g.width for g in groups], {}
        for j, level in enumerate(PRUNE_LEVELS):
            counts[i] = max(1, min(width - 1, round(width * (1 - level))))
            if counts[i] not in known:
                each = divergence(model, plan_from_counts(groups, counts, scores), answers, dense)
                means = torch.stack([each[of_task].mean() for of_task in rows])
                known[counts[i]] = means.clamp_min(0)
            removed = 1 - counts[i] / width
            # Few units cannot lose exactly a quarter: scale the measured KL to the level.
            result[:, i, j] = known[counts[i]] * (level / removed) ** 2
        tick(number, len(several))
    if several:
        single = [i for i, g in enumerate(groups) if g.width == 1]
        result[:, single] = result[:, several].median(1, keepdim=True).values
    return result


def divergence(
    model: nn.Module,
    plan: PruningPlan,
    answers: AnswerLogits,
    dense: Float[Tensor, "rows vocabulary"],
) -> Float[Tensor, " rows"]:
    """KL [nats] of every row's answer under `plan` from the dense model's.

    Args:
        model: masked for the measurement.
        plan: plan for `model`.
        answers: reader of the answers of the calibration rows.
        dense: log probabilities of the dense model's answers.
    """
    with masked(model, plan):
        pruned = answers(model).log_softmax(-1)
    return (dense.exp() * (dense - pruned)).sum(-1)


def _rows_of_tasks(tasks: Mapping[Task, Sequence[Batch]], batches: Sequence[Batch]) -> list[Tensor]:
    """For each task, a mask of the rows of `batches` that belong to it."""
    owners = [{id(batch) for batch in tasks[task]} for task in TASKS]
    return [
        torch.tensor([id(b) in owner for b in batches for _ in b["input_ids"]]) for owner in owners
    ]
