"""What a fit leaves beside its policy: the plans that were evaluated, and how."""

from collections.abc import Sequence

import numpy as np

from hipp_ext.budget import Bounds, parameters_left
from hipp_ext.errors import PlanError
from hipp_ext.groups import Group, total_parameters
from hipp_ext.planner.archive import Archive, Record
from hipp_ext.planner.cost import Cost
from hipp_ext.planner.evaluation import Keeps
from hipp_ext.planner.reward import Reward, best_for
from hipp_ext.preference import Preference


class Experience:
    """The evaluated plans of one model.

    Attributes:
        archive: all of them, in the order of their evaluation.
        ranking: of the signals that the plans were made with, see `Signals.ranking`; None: nothing was evaluated.
        cost: what their compression counts; None: not known.
        dense: what the evaluator said of the dense model, "utility" and "robustness"; None: not known.
        evaluator: its digest; None: it has none.
    """

    def __init__(
        self,
        *,
        records: Sequence[Record] = (),
        ranking: str | None = None,
        cost: Cost | None = None,
        dense: dict[str, float] | None = None,
        evaluator: str | None = None,
    ):
        self.archive = Archive()
        self.archive.append(records)
        self.ranking, self.cost, self.dense, self.evaluator = ranking, cost, dense, evaluator

    def reward(self, keeps: Keeps) -> Reward | None:
        """What was measured of a plan."""
        return next((r.reward for r in self.archive.measured if r.keeps == keeps), None)

    def best(
        self,
        preference: Preference,
        groups: Sequence[Group],
        bounds: Bounds,
        pruning_ratio: float | None,
    ) -> Record:
        """The evaluated plan that serves a preference best, among those that the bounds allow and that remove
        `pruning_ratio` or more.

        Raises:
            PlanError: there is none.
        """
        known = self.archive.measured
        if not known:
            raise PlanError(
                f"The gate (min_stability) kept all {len(self.archive)} plans from being measured."
            )
        allowed = bounds.allow(groups, np.array([r.keeps for r in known]))
        within = [r for r, fits in zip(known, allowed.tolist(), strict=True) if fits]
        if not within:
            raise PlanError(f"{bounds} allows none of {len(known)} evaluated plans.")
        most = parameters_left(total_parameters(groups), pruning_ratio or 0.0)
        enough = [
            r
            for r in within
            if sum(k * g.unit_parameters for k, g in zip(r.keeps, groups, strict=True)) <= most
        ]
        if not enough:
            raise PlanError(
                f"None of {len(within)} evaluated plans removes {pruning_ratio:g} or more."
            )
        return enough[
            best_for(
                [r.reward for r in enough], preference.as_tuple(), self.archive.nadir_and_ideal()
            )
        ]
