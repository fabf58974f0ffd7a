"""What a fitted planner answers: plans with their measured rewards."""

from dataclasses import dataclass

from hipp_ext.plan import PruningPlan
from hipp_ext.planner.reward import Reward


@dataclass(frozen=True, kw_only=True)
class ParetoPlan:
    """A plan and its measured reward; None: it was not evaluated."""

    plan: PruningPlan
    reward: Reward | None


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Two answers to one preference.

    Attributes:
        policy: the policy's plan; it may not have been evaluated, see `HiPPPlanner.rewards`.
        best_evaluated: the evaluated plan that is best for the preference.
    """

    policy: ParetoPlan
    best_evaluated: ParetoPlan

    def verdict(self) -> str:
        """Which of the two dominates, in a sentence."""
        ours, theirs = self.policy.reward, self.best_evaluated.reward
        assert theirs is not None
        if self.policy.plan.keep_counts == self.best_evaluated.plan.keep_counts:
            return "They are the same plan."
        if ours is None:
            return "The policy's plan was not evaluated; `hipp front --model` evaluates it."
        if ours.dominates(theirs):
            return "The policy's plan dominates the best evaluated one."
        if theirs.dominates(ours):
            return (
                "The best evaluated plan dominates the policy's: take it "
                "(`hipp plan --best-evaluated`), or fit longer."
            )
        return "Neither dominates the other."
