"""Sensitivity: prune where the output changes least."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext import budget
from hipp_ext.allocators.base import Allocator
from hipp_ext.budget import Bounds
from hipp_ext.calibration import Calibration
from hipp_ext.errors import BudgetError
from hipp_ext.scorers.base import Groups, Scores
from hipp_ext.sensitivity.cheapest_path import CheapestPath
from hipp_ext.sensitivity.curves import LEVELS
from hipp_ext.sensitivity.efforts import Effort, check_effort, measure_sensitivity

MAX_LOGIT_FRACTION = 0.998  # the logit of a whole group would be infinite
STAYS = 1e6  # nats; the loss of what cannot go
DROPPED_FRACTION = 1e-4  # stays of a group that goes whole, for the same reason


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Allocator):
    """Keeps what loses least: the losses of the groups sum to the minimum at the budget.

    The loss of a group is the KL divergence of the outputs from dense when it alone is pruned, see
    `measure_sensitivity`. An untrained `HiPPPlanner` allocates by the same function.

    Args:
        effort: how the losses are found: "fisher", "anchored" or "measured".
        robustness_weight: weight of the loss on the task "robustness", in [0, 1]; "utility" has the
            rest. Without a calibration by task both are the same.
        seed: random seed of the Fisher estimate.

    Raises:
        BudgetError: the effort is unknown, or robustness_weight is outside [0, 1].

    Source: measuring each layer alone and then solving, HAWQ-V3 (arXiv 2011.10680) and Puzzle
    (arXiv 2411.19146). The solver is `CheapestPath`.
    """

    effort: Effort = "anchored"
    robustness_weight: float = 0.5
    seed: int = 0
    needs_calibration = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_effort(self.effort)
        if not 0 <= self.robustness_weight <= 1:
            raise BudgetError(
                f"robustness_weight={self.robustness_weight!r}: a number in [0, 1] is needed."
            )

    def measure(
        self,
        model: nn.Module,
        groups: Groups,
        scores: Scores,
        calibration: Calibration | None,
        progress: bool = False,
    ) -> Float[Tensor, "tasks groups levels"]:
        """The sensitivity of each task [nats], see `measure_sensitivity`."""
        assert calibration is not None
        return measure_sensitivity(
            model,
            calibration,
            groups,
            scores,
            effort=self.effort,
            seed=self.seed,
            progress=progress,
        )

    def keep_counts(self, groups: Groups, scores: Scores, measured: Any) -> tuple[int, ...]:
        losses = allowed_levels(measured, self.bounds or Bounds())
        logits = cheapest_logits(groups, losses, self.pruning_ratio, self.robustness_weight)
        return budget.keep_counts(groups, logits.tolist(), self.pruning_ratio, self.bounds)


def allowed_levels(
    sensitivity: Float[Tensor, "tasks groups levels"], bounds: Bounds
) -> Float[Tensor, "tasks groups allowed"]:
    """The sensitivity without the level that drops a block, where the bounds drop none."""
    whole = LEVELS.index(1.0)
    return sensitivity[..., :whole] if bounds.drop == "none" else sensitivity


def cheapest_logits(
    groups: Groups,
    sensitivity: Float[Tensor, "tasks groups levels"],
    pruning_ratio: float,
    robustness_weight: float,
) -> Float[Tensor, " groups"]:
    """Allocation logits of the keep fractions whose losses sum to the minimum.

    Args:
        groups: groups to be pruned.
        sensitivity: losses at LEVELS, with or without the last, see `allowed_levels`.
        pruning_ratio: removed fraction of the prunable parameters.
        robustness_weight: weight of the losses on the task "robustness".
    """
    utility, robustness = sensitivity
    losses = torch.lerp(utility, robustness, robustness_weight)
    levels = LEVELS[: losses.shape[1]]
    if 1 not in levels:  # a group of one unit stays
        losses = losses.masked_fill(torch.tensor([[g.width == 1] for g in groups]), STAYS)
    path = CheapestPath([g.parameters for g in groups], levels, losses)
    fractions = path.keep_fractions(torch.tensor([pruning_ratio]))[0]
    least = DROPPED_FRACTION if 1 in levels else 1 - MAX_LOGIT_FRACTION
    return torch.logit(fractions.clamp(least, MAX_LOGIT_FRACTION))
