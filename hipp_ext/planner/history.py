"""What a fit leaves beside its policy: the evaluated plans, and what they were evaluated with."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hipp_ext.budget import Bounds, parameters_left
from hipp_ext.errors import PlanError
from hipp_ext.groups import Group, total_parameters
from hipp_ext.limits import Excess, no_excess
from hipp_ext.planner.archive import Archive, Record
from hipp_ext.planner.evaluation import KeepCounts
from hipp_ext.planner.reward import Reward, best_for
from hipp_ext.preference import Preference


@dataclass(frozen=True, kw_only=True)
class FitHistory:
    """The evaluated plans of one model.

    Attributes:
        archive: all of them, in the order of their evaluation.
        ranking: digest of the unit ranking that they were evaluated with, see `Signals.ranking`;
            None before any fit.
        cost: kind of cost that their compression counts; None before any fit.
        dense: the evaluator's "utility" and "robustness" of the dense model; None: unknown.
        evaluator: digest of the evaluator; None: it has none.
        command: command line of the fit; None: it was done in Python.
    """

    archive: Archive = field(default_factory=Archive)
    ranking: str | None = None
    cost: str | None = None
    dense: dict[str, float] | None = None
    evaluator: str | None = None
    command: str | None = None

    def reward(self, keep_counts: KeepCounts) -> Reward | None:
        """The measured reward of a plan; None: it was not evaluated."""
        known = (r.reward for r in self.archive.measured if r.keep_counts == keep_counts)
        return next(known, None)

    def best(
        self,
        preference: Preference,
        groups: Sequence[Group],
        bounds: Bounds,
        pruning_ratio: float | None,
        excess: Excess = no_excess,
    ) -> Record:
        """The evaluated plan that is best for a preference.

        Args:
            preference: weights of the objectives.
            groups: groups of the model.
            bounds: bounds that the plan must meet.
            pruning_ratio: least fraction of the parameters that it removes; None: any.
            excess: tells which limit a plan exceeds.

        Raises:
            PlanError: no evaluated plan meets the bounds, the ratio and the limits.
        """
        known = self.archive.measured
        allowed = bounds.allow(groups, np.array([r.keep_counts for r in known]))
        within = [r for r, fits in zip(known, allowed.tolist(), strict=True) if fits]
        if not within:
            raise PlanError(f"{bounds} allows none of {len(known)} evaluated plans.")
        most = parameters_left(total_parameters(groups), pruning_ratio or 0.0)
        sizes = np.array([g.unit_parameters for g in groups])
        enough = [r for r in within if int(sizes @ np.array(r.keep_counts)) <= most]
        if not enough:
            raise PlanError(
                f"None of {len(within)} evaluated plans removes {pruning_ratio:g} or more."
            )
        reasons = [excess(r.keep_counts) for r in enough]
        enough = [r for r, reason in zip(enough, reasons, strict=True) if not reason]
        if not enough:
            raise PlanError(
                f"None of {len(reasons)} evaluated plans meets the limits; of the first one, "
                f"{reasons[0]}."
            )
        rewards, ends = [r.reward for r in enough], self.archive.nadir_and_ideal()
        return enough[best_for(rewards, preference.as_tuple(), ends)]
