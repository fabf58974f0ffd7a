"""How a fit is done, and what it reports."""

import math
from dataclasses import dataclass
from pathlib import Path

from hipp_ext.errors import PlanError
from hipp_ext.quantities import take_numbers

WHOLE_NUMBERS = ("steps", "preferences", "budgets", "rollouts", "updates", "candidates", "seed")
FINITE_NUMBERS = ("final_update_fraction", "lr", "budget_noise")


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """Settings of a fit, which evaluates `evaluations` plans in all.

    It evaluates fewer where two rollouts round to the same plan. Where pruning_ratio is fixed there
    is one budget per preference, whatever `budgets` is, and so many plans less.

    Attributes:
        steps: rounds of proposing, measuring and learning.
        preferences: preferences per step, drawn over the whole simplex.
        budgets: budgets per preference.
        rollouts: allocations per preference and budget, at least 2.
        updates: policy updates per step, on rollouts that the surrogate scores.
        final_update_fraction: number of updates after the last step, as a fraction of all before.
            They train the policy anew from where the fit began, with a learning rate that falls to
            zero. 0: the policy stays as it is.
        candidates: number of plans from which each measured rollout is chosen.
        lr: learning rate of Adam.
        noise: standard deviation of the allocation logits at the first and at the last step.
        budget_noise: standard deviation of the budget logit.
        seed: random seed of preferences and noise. The same seed and initial policy give the same
            archive.

    Raises:
        PlanError: a value is not a number of the right kind.
        ValueError: a number is outside its range.
    """

    steps: int = 20
    preferences: int = 2
    budgets: int = 3
    rollouts: int = 2
    updates: int = 40
    final_update_fraction: float = 1.6
    candidates: int = 192
    lr: float = 3e-3
    noise: tuple[float, float] = (0.7, 0.3)
    budget_noise: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        take_numbers(self, PlanError, wholes=WHOLE_NUMBERS, finites=FINITE_NUMBERS)
        if self.steps < 0 or min(self.preferences, self.budgets) < 1 or self.rollouts < 2:
            raise ValueError(
                f"steps >= 0, preferences and budgets >= 1 and rollouts >= 2 are needed: {self}"
            )
        if min(self.updates, self.final_update_fraction) < 0:
            raise ValueError(f"updates and final_update_fraction >= 0 are needed: {self}")
        if self.candidates < max(8, self.rollouts):
            raise ValueError(f"candidates >= 8 and >= rollouts are needed: {self}")
        if not all(0 < x < math.inf for x in (*self.noise, self.budget_noise, self.lr)):
            raise ValueError(f"noise, budget_noise and lr above 0 are needed: {self}")

    @property
    def evaluations(self) -> int:
        """Number of plans that a full fit evaluates when the policy decides on the budgets."""
        return self.steps * self.preferences * self.budgets * self.rollouts


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a fit did.

    Attributes:
        steps: rounds in all, those of earlier, interrupted runs included.
        evaluations: number of plans that were measured, each counted once.
        hypervolume: hypervolume of the archive's front, see `archive.REFERENCE_POINT`.
        history: hypervolume after every step of this run.
        folder: folder of checkpoint and archive, or None.
    """

    steps: int
    evaluations: int
    hypervolume: float
    history: tuple[float, ...]
    folder: Path | None
