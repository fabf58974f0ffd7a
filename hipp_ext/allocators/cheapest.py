"""Losses of the groups -> the allocation that loses least, whatever shape the plan may have."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hipp_ext import budget
from hipp_ext.budget import Bounds
from hipp_ext.scorers.base import Groups
from hipp_ext.sensitivity.cheapest_path import CheapestPath
from hipp_ext.sensitivity.curves import LEVELS

MAX_LOGIT_FRACTION = 0.998  # the logit of a whole group would be infinite
STAYS = 1e6  # nats; the loss of what cannot go
DROPPED_FRACTION = 1e-4  # stays of a group that goes whole, for the same reason


def task_losses(
    sensitivity: Float[Tensor, "tasks groups levels"], robustness_weight: float
) -> Float[Tensor, "groups levels"]:
    """The losses of the groups with the tasks weighted; "utility" has what is left of 1."""
    utility, robustness = sensitivity
    return torch.lerp(utility, robustness, robustness_weight)


def cheapest_logits(
    groups: Groups, losses: Float[Tensor, "groups levels"], pruning_ratio: float, bounds: Bounds
) -> Float[Tensor, " groups"]:
    """Allocation logits of the keep fractions whose losses sum to the minimum.

    Args:
        groups: groups to be pruned.
        losses: losses at LEVELS [nats].
        pruning_ratio: removed fraction of the prunable parameters.
        bounds: which keep counts are allowed; of their shapes, the one that loses least.
    """
    if bounds.shape == "free":
        fractions = _free_fractions(groups, losses, pruning_ratio, bounds)
        least = 1 - MAX_LOGIT_FRACTION if bounds.drop == "none" else DROPPED_FRACTION
        return torch.logit(fractions.clamp(least, MAX_LOGIT_FRACTION))
    plans = stock_plans(groups, losses, pruning_ratio, bounds)
    counts = plans[int(expected_losses(groups, plans, losses).argmin())]
    fractions = torch.tensor(counts / [g.width for g in groups], dtype=torch.float32)
    return torch.logit(fractions.clamp(DROPPED_FRACTION, MAX_LOGIT_FRACTION))


def expected_losses(
    groups: Groups, counts: np.ndarray, losses: Float[Tensor, "groups levels"]
) -> np.ndarray:
    """(plans, groups) keep counts -> (plans,) sum of the groups' losses [nats]."""
    removed = 1 - counts / [g.width for g in groups]
    curves = np.pad(losses.double().numpy(), [(0, 0), (1, 0)])
    levels = [0.0, *LEVELS]
    each = [np.interp(removed[:, i], levels, curve) for i, curve in enumerate(curves)]
    return np.sum(each, axis=0)


def stock_plans(
    groups: Groups, losses: Float[Tensor, "groups levels"], pruning_ratio: float, bounds: Bounds
) -> np.ndarray:
    """(plans, groups) keep counts that meet the ratio: of uniform plans those that cannot keep
    more, and of plans that drop layers the one that loses least."""
    total = sum(g.parameters for g in groups)
    target = budget.parameters_left(total, pruning_ratio)
    found = []
    for alternative in bounds.alternatives:
        if alternative.shape == "uniform":
            found.append(budget.uniform_plans(groups, target, alternative))
        else:
            found.append(_cheapest_layers(groups, losses, target, alternative)[None])
    plans = np.concatenate(found)
    return plans if len(plans) else bounds.smallest(groups)[None]


def _cheapest_layers(
    groups: Groups, losses: Float[Tensor, "groups levels"], target: int, bounds: Bounds
) -> np.ndarray:
    """Keep counts without the layers that lose least per parameter, until the target is met."""
    counts = np.array([g.width for g in groups])
    sizes = np.array([g.parameters for g in groups])
    whole = losses[:, LEVELS.index(1.0)].double().numpy()
    layers = sorted(
        bounds.dropped_together(groups), key=lambda row: whole[row].sum() / sizes[row].sum()
    )
    for row in layers:
        if sizes[counts > 0].sum() <= target:
            break
        counts[row] = 0
    return counts


def _free_fractions(
    groups: Groups, losses: Float[Tensor, "groups levels"], pruning_ratio: float, bounds: Bounds
) -> Float[Tensor, " groups"]:
    levels: Sequence[float] = LEVELS
    if bounds.drop == "none":
        whole = LEVELS.index(1.0)
        levels, losses = LEVELS[:whole], losses[:, :whole]
        # A group that cannot lose a unit stays, such as one of a single unit.
        losses = losses.masked_fill(torch.tensor([[g.width == g.least] for g in groups]), STAYS)
    else:
        losses = losses.clone()
        losses[[not g.droppable for g in groups], LEVELS.index(1.0)] = STAYS
    path = CheapestPath([g.parameters for g in groups], levels, losses)
    return path.keep_fractions(torch.tensor([pruning_ratio]))[0]
