"""Sensitivity: prune where the output changes least."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext import budget
from hipp_ext.allocators.base import Allocator
from hipp_ext.allocators.cheapest import cheapest_logits, task_losses
from hipp_ext.budget import Bounds
from hipp_ext.calibration import Calibration
from hipp_ext.errors import BudgetError
from hipp_ext.groups import tower_layers
from hipp_ext.scorers import WandaSP, says_all
from hipp_ext.scorers.base import Groups, Scores
from hipp_ext.sensitivity.cached import cached_sensitivity, known_sensitivity, measured_on
from hipp_ext.sensitivity.efforts import Effort, check_effort, forward_passes, measure_sensitivity


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
        cache: folder where the losses are kept for this model and calibration, across processes,
            and what an interrupted measurement has finished; None: nowhere. With a scorer that is
            not one of `hipp_ext.scorers`, nothing is kept.

    Raises:
        BudgetError: the effort is unknown, or robustness_weight is outside [0, 1].

    Source: measuring each layer alone and then solving, HAWQ-V3 (arXiv 2011.10680) and Puzzle
    (arXiv 2411.19146). The solver is `CheapestPath`.
    """

    effort: Effort = "anchored"
    robustness_weight: float = 0.5
    seed: int = 0
    cache: Path | None = None
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
        given = model, calibration, groups, scores
        options: Any = {"effort": self.effort, "seed": self.seed, "progress": progress}
        if self._folder is None:
            return measure_sensitivity(*given, **options)
        identity = self._identity(model, groups, calibration)
        return cached_sensitivity(*given, self._folder, identity, **options)

    def passes(self, model: nn.Module, groups: Groups, calibration: Calibration) -> float:
        if self._folder is not None:
            identity = self._identity(model, groups, calibration)
            if known_sensitivity(self._folder, identity, groups) is not None:
                return 0.0
        return forward_passes(groups, len(tower_layers(model, "language")), self.effort)

    @property
    def _folder(self) -> Path | None:
        return self.cache if self.scorer is None or says_all(self.scorer) else None

    def _identity(
        self, model: nn.Module, groups: Groups, calibration: Calibration
    ) -> dict[str, Any]:
        settings = {"effort": self.effort, "seed": self.seed}
        scorer = (self.scorer or WandaSP()).name
        return measured_on(model, groups, calibration, scorer=scorer, **settings)

    def keep_counts(self, groups: Groups, scores: Scores, measured: Any) -> tuple[int, ...]:
        bounds = self.bounds or Bounds()
        losses = task_losses(measured, self.robustness_weight)
        logits = cheapest_logits(groups, losses, self.pruning_ratio, bounds)
        return budget.keep_counts(groups, logits.tolist(), self.pruning_ratio, self.bounds)
