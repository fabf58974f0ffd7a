"""What a fit leaves beside its policy: the plans that were evaluated, and how."""

from collections.abc import Sequence

import numpy as np

from hipp_ext.budget import Bounds
from hipp_ext.errors import PlanError
from hipp_ext.groups import Group
from hipp_ext.planner.archive import Archive, Record
from hipp_ext.planner.cost import Cost
from hipp_ext.planner.evaluation import Keeps
from hipp_ext.planner.reward import Reward, best_for
from hipp_ext.preference import Preference


class Experience:
    """The evaluated plans of one model.

    Attributes:
        archive: all of them, in the order of their evaluation.
        digest: of the model; None: nothing was evaluated.
        cost: what their compression counts; None: not known.
        dense: what the evaluator said of the dense model, "utility" and "robustness"; None: not known.
    """

    def __init__(
        self, *, records: Sequence[Record] = (), digest: str | None = None, cost: Cost | None = None,
        dense: dict[str, float] | None = None,
    ):  # fmt: skip
        self.archive = Archive()
        self.archive.append(records)
        self.digest, self.cost, self.dense = digest, cost, dense

    def reward(self, keeps: Keeps) -> Reward | None:
        """What was measured of a plan."""
        return next((r.reward for r in self._measured() if r.keeps == keeps), None)

    def best(self, preference: Preference, groups: Sequence[Group], bounds: Bounds, pruning_ratio: float | None) -> Record:
        """The evaluated plan that serves a preference best, among those that the bounds allow and that remove
        `pruning_ratio` or more.

        Raises:
            PlanError: there is none.
        """
        known = self._measured()
        if not known:
            raise PlanError(f"The gate (min_stability) kept all {len(self.archive)} plans from being measured.")
        allowed = bounds.allow(groups, np.array([r.keeps for r in known]))
        within = [r for r, fits in zip(known, allowed.tolist(), strict=True) if fits]
        if not within:
            raise PlanError(f"{bounds} allows none of {len(known)} evaluated plans.")
        enough = [r for r in within if pruning_ratio is None or r.pruning_ratio >= pruning_ratio]
        if not enough:
            raise PlanError(f"None of {len(within)} evaluated plans removes {pruning_ratio:g} or more.")
        return enough[best_for([r.reward for r in enough], preference.as_tuple(), self.archive.nadir_and_ideal())]

    def _measured(self) -> list[Record]:
        return [r for r in self.archive.records if r.measured]
