"""What a fit searches: the plans of one model within their bounds, and what they save."""

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hipp_ext.budget import Bounds, Cost, largest_ratio, many_keep_counts
from hipp_ext.planner.cost import compression
from hipp_ext.planner.policy import MAX_RATIO
from hipp_ext.planner.settings import FitSettings
from hipp_ext.planner.state import Signals


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitProblem:
    """Everything that a fit is given but the policy, the model and its evaluator.

    Attributes:
        signals: signals of the model.
        settings: how many plans, and how they are drawn.
        cost: what compression counts.
        bounds: bounds of the keep counts.
        pruning_ratio: fixes the budget; None: the policy decides.
        mrs: name of the scorer MRS, if the signals have it.
    """

    signals: Signals
    settings: FitSettings
    cost: Cost
    bounds: Bounds = dataclasses.field(default_factory=Bounds)
    pruning_ratio: float | None = None
    mrs: str | None = None

    @functools.cached_property
    def limit(self) -> float:
        """Largest ratio that is searched."""
        return min(MAX_RATIO, largest_ratio(self.signals.groups, self.bounds))

    @property
    def budgets(self) -> int:
        """Number of budgets of a preference."""
        return self.settings.budgets if self.pruning_ratio is None else 1

    @property
    def plans_per_step(self) -> int:
        """Number of plans that a step measures."""
        return self.settings.preferences * self.settings.rollouts * self.budgets

    def counts(
        self, allocations: Float[Tensor, "C G"], ratios: float | Float[Tensor, " C"] | np.ndarray
    ) -> np.ndarray:
        """Keep counts of plans, before the rest of the budget that rounding leaves is spent."""
        each = np.broadcast_to(np.asarray(ratios, dtype=np.float64), len(allocations))
        logits = allocations.double().numpy()
        return many_keep_counts(self.signals.groups, logits, each, self.bounds)

    def with_compression(
        self, scores: Float[Tensor, "*batch C 2"], counts: np.ndarray
    ) -> Float[Tensor, "*batch C 3"]:
        """Objectives of plans: the scores of the two tasks, and what the keep counts save."""
        saved = compression(self.cost, self.signals.groups, counts)[:, None].float()
        return torch.cat([scores, saved.expand(*scores.shape[:-1], 1)], -1)

    def identity(self, dense: dict[str, float], evaluator: str | None) -> dict[str, Any]:
        """What must be equal for an interrupted fit to go on, see `RunFolder`.

        Args:
            dense: scores of the dense model; they stand for the questions of an evaluator without
                a digest.
            evaluator: digest of the evaluator, if it has one.
        """
        # More steps may be asked for later.
        settings = dataclasses.replace(self.settings, steps=0)
        return {
            "settings": dataclasses.asdict(settings),
            "pruning_ratio": self.pruning_ratio,
            "bounds": dataclasses.asdict(self.bounds),
            "cost": self.cost.name,
            "mrs": self.mrs,
            "scorer": self.signals.scorer,
            "effort": self.signals.effort,
            "model": self.signals.digest,
            "calibration": self.signals.calibration,
            "evaluator": evaluator,
            "dense": dense,
        }
