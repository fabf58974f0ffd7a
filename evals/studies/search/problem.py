"""What every search method gets: an expensive function of plans, and a number of evaluations."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from hipp_ext.allocators.levels import Levels
from hipp_ext.budget import Bounds, keep_counts, largest_ratio
from hipp_ext.errors import BudgetError
from hipp_ext.groups import Group
from hipp_ext.planner.policy import MAX_RATIO
from hipp_ext.planner.reward import Reward

Keeps = tuple[int, ...]
# Repeated plans per evaluation that a method may ask for before it counts as stuck.
LOOKUPS_PER_EVALUATION = 20


class Exhausted(Exception):
    """The evaluations are spent, or the method only asks for plans that it knows."""


@dataclass(kw_only=True, eq=False)
class Problem:
    """`problem(keep_counts)` -> Reward; a plan that is asked for again costs nothing.

    Attributes:
        groups: groups of the model.
        bounds: bounds of the keep counts.
        evaluate: keep counts -> reward; utility, robustness and compression are maximized.
        evaluations: number of different plans that may be evaluated.
        largest_ratio: upper end of the pruning_ratio that is searched.
        pruning_ratio: what every plan removes, whatever a method asks for; None: methods choose.
        centre: pruning_ratio -> allocation logits of the plan that methods start from and search
            around; None: uniform plans.
        lookups: number of repeated requests.
    """

    groups: tuple[Group, ...]
    bounds: Bounds
    evaluate: Callable[[Keeps], Reward]
    evaluations: int
    largest_ratio: float = MAX_RATIO
    pruning_ratio: float | None = None
    centre: Callable[[float], np.ndarray] | None = None
    lookups: int = field(default=0, init=False)
    _known: dict[Keeps, Reward] = field(default_factory=dict, init=False, repr=False)

    @property
    def evaluated(self) -> list[tuple[Keeps, Reward]]:
        """Every evaluated plan with its reward, in order, without repetitions."""
        return list(self._known.items())

    @cached_property
    def levels(self) -> Levels:
        """The allowed keep counts."""
        return Levels.of(self.groups, self.bounds)

    @cached_property
    def limit(self) -> float:
        """The largest pruning_ratio of the search that the bounds allow."""
        return min(self.largest_ratio, largest_ratio(self.groups, self.bounds))

    def __call__(self, keeps: Sequence[int]) -> Reward:
        """The reward of a plan.

        Raises:
            Exhausted: the plan is new and no evaluation is left, or the method repeated too many
                plans.
            BudgetError: a keep count is not allowed by the bounds.
        """
        plan = tuple(int(k) for k in keeps)
        if plan in self._known:
            self.lookups += 1
            if self.lookups > LOOKUPS_PER_EVALUATION * self.evaluations:
                raise Exhausted(f"{self.lookups} repeated plans, {len(self._known)} different ones")
            return self._known[plan]
        if not self.levels.allows(plan):
            raise BudgetError(
                f"A search method asked for {plan}, which {self.bounds} do not allow."
            )
        if len(self._known) >= self.evaluations:
            raise Exhausted(f"all {self.evaluations} evaluations are spent")
        self._known[plan] = self.evaluate(plan)
        return self._known[plan]

    def decode(self, allocation_logits: Sequence[float] | np.ndarray, ratio: float) -> Keeps:
        """Keep counts for one logit per group, added to the centre's, and a pruning_ratio.

        The ratio is clipped to [0, limit]; a problem with a pruning_ratio of its own takes that.
        """
        asked = ratio if self.pruning_ratio is None else self.pruning_ratio
        ratio = float(np.clip(asked, 0.0, self.limit))
        logits = np.asarray(allocation_logits, dtype=np.float64)
        if self.centre is not None:
            logits = logits + self.centre(ratio)
        return keep_counts(self.groups, logits.tolist(), ratio, self.bounds)


Method = Callable[[Problem, int], None]


def run(method: Method, problem: Problem, seed: int) -> Problem:
    """`problem` after `method` has spent its evaluations."""
    with contextlib.suppress(Exhausted):
        method(problem, seed)
    return problem
