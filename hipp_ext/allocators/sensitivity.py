"""Sensitivity: prune where measured sensitivity says that the output changes least."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext import budget
from hipp_ext.allocators.base import Allocator
from hipp_ext.allocators.cheapest_path import CheapestPath
from hipp_ext.budget import Bounds
from hipp_ext.calibration import Calibration
from hipp_ext.errors import BudgetError
from hipp_ext.progress import counting
from hipp_ext.scorers.base import Groups, Scores
from hipp_ext.sensitivity.measured import DROP_LEVELS, levels_for, measure_sensitivity

MAX_LOGIT_FRACTION = 0.95  # the logit of a whole group would be infinite
DROPPED_FRACTION = 1e-4  # stays of a group that goes whole, for the same reason


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Allocator):
    """Keeps what loses least: the measured losses of the groups sum to the minimum at the budget.

    The loss of a group is the KL divergence of the answers from dense when it alone is pruned, see
    `measure_sensitivity`. An untrained `HiPPPlanner` allocates by the same function.

    Args:
        robustness_weight: weight of the loss on the task "robustness", in [0, 1]; "utility" has the
            rest. Without a calibration by task both are the same.

    Raises:
        BudgetError: robustness_weight is outside [0, 1].

    Source: measuring each layer alone and then solving, HAWQ-V3 (arXiv 2011.10680) and Puzzle
    (arXiv 2411.19146). The solver is `CheapestPath`.
    """

    robustness_weight: float = 0.5
    needs_calibration = True

    def __post_init__(self) -> None:
        super().__post_init__()
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
        """The measured sensitivity of each task [nats]."""
        assert calibration is not None
        with counting(progress, "measuring sensitivity") as tick:
            levels = levels_for(self.bounds or Bounds())
            return measure_sensitivity(model, calibration, groups, scores, tick, levels=levels)

    def keep_counts(self, groups: Groups, scores: Scores, measured: Any) -> tuple[int, ...]:
        logits = cheapest_logits(groups, measured, self.pruning_ratio, self.robustness_weight)
        return budget.keep_counts(groups, logits.tolist(), self.pruning_ratio, self.bounds)


def cheapest_logits(
    groups: Groups,
    sensitivity: Float[Tensor, "tasks groups levels"],
    pruning_ratio: float,
    robustness_weight: float,
) -> Float[Tensor, " groups"]:
    """Allocation logits of the keep fractions whose measured losses sum to the minimum."""
    utility, robustness = sensitivity
    losses = torch.lerp(utility, robustness, robustness_weight)
    levels = DROP_LEVELS[: losses.shape[1]]
    path = CheapestPath([g.parameters for g in groups], levels, losses)
    fractions = path.keep_fractions(torch.tensor([pruning_ratio]))[0]
    least = DROPPED_FRACTION if 1 in levels else 1 - MAX_LOGIT_FRACTION
    return torch.logit(fractions.clamp(least, MAX_LOGIT_FRACTION))
