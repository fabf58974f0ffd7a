"""What a fit proposes to measure, and how its policy learns from what was measured."""

import torch
from jaxtyping import Float
from torch import Tensor

from hipp_ext.planner.archive import Archive
from hipp_ext.planner.grpo import Learner, Rollouts, draw_preferences
from hipp_ext.planner.policy import Policy
from hipp_ext.planner.problem import FitProblem
from hipp_ext.planner.proposals import Proposer
from hipp_ext.planner.state import keep_fractions
from hipp_ext.planner.surrogate import Surrogate

BATCH = (16, 2, 8)  # preferences, budgets and rollouts of a policy update
LCB_BETA = 2.0  # the policy is trained on the surrogate's mean - LCB_BETA * deviation
LR_DECAY_FRACTION = 0.4  # of the final updates, over which the learning rate falls to zero
N_RATIOS = 16  # of the grid on which the best budget is sought


class PolicySearch:
    """A policy, a surrogate of its reward, and a proposer of plans.

    Args:
        policy: policy to be trained.
        problem: plans that are searched, and settings of the fit.
    """

    def __init__(self, policy: Policy, problem: FitProblem):
        self.problem, self.settings = problem, problem.settings
        self.groups = problem.signals.groups
        self.learner = Learner(policy, problem.signals, problem.settings.lr)
        self.surrogate = Surrogate(problem.signals.curvature)
        self.proposer = Proposer(problem=problem, surrogate=self.surrogate, learner=self.learner)

    def know(self, archive: Archive) -> None:
        """Fit the surrogate, and the ends of the objectives, to the measured plans."""
        self.learner.ends = archive.nadir_and_ideal()
        if known := archive.measured:
            rewards = torch.tensor([[r.reward.utility, r.reward.robustness] for r in known])
            plans = [r.keep_counts for r in known]
            self.surrogate.fit(keep_fractions(self.groups, plans), rewards)

    def propose(self, archive: Archive, step: int, generator: torch.Generator) -> Rollouts:
        """The rollouts to measure next: the policy's own until any plan was measured."""
        s, chooses = self.settings, len(archive) > 0
        first, last = s.noise
        drawn = self.learner.draw(
            draw_preferences(s.preferences, generator),
            self.problem.budgets,
            s.candidates // 2 if chooses else s.rollouts,
            noise=first + (last - first) * step / max(s.steps - 1, 1),
            budget_noise=s.budget_noise,
            ratio=self.problem.pruning_ratio,
            limit=self.problem.limit,
            generator=generator,
        )
        return self.proposer.choose(drawn, archive, generator) if chooses else drawn

    def learn(self, generator: torch.Generator) -> None:
        """The policy updates of one step."""
        for update in range(self.settings.updates):
            self._update(update, generator)

    def learn_anew(self, step: int, generator: torch.Generator) -> None:
        """The final updates, from where the fit began.

        What a policy learned while little was known can have led it to where small steps do not
        lead back.
        """
        s = self.settings
        updates = round(s.final_update_fraction * s.updates * step)
        self.learner.restart()
        for update in range(updates):
            left = (updates - update) / (LR_DECAY_FRACTION * updates)
            self.learner.set_lr(s.lr * min(1.0, left))
            self._update(update, generator)

    def _update(self, update: int, generator: torch.Generator) -> None:
        """At the policy's budgets and, every other time, at any: a user may fix the budget."""
        n, budgets, rollouts = BATCH
        preferences, ratio = draw_preferences(n, generator), self.problem.pruning_ratio
        own = ratio is None and update % 2 == 0
        if ratio is None and not own:
            ratio = self.problem.limit * torch.rand(n, budgets, generator=generator)
        drawn = self.learner.draw(
            preferences,
            budgets,
            rollouts,
            noise=self.settings.noise[1],
            budget_noise=1.0,
            ratio=ratio,
            limit=self.problem.limit,
            generator=generator,
        )
        self.learner.learn(drawn, self._predicted(drawn))
        if own:
            self._learn_budgets(preferences)

    def _predicted(self, rollouts: Rollouts) -> Float[Tensor, "P M N 3"]:
        shape = rollouts.allocations.shape
        ratios = rollouts.ratios[:, :, None].expand(shape[:3]).flatten()
        allocations = rollouts.allocations.reshape(-1, shape[3])
        return self._objectives(allocations, ratios).view(*shape[:3], 3)

    def _objectives(
        self, allocations: Float[Tensor, "C G"], ratios: Float[Tensor, " C"]
    ) -> Float[Tensor, "C 3"]:
        """Lower confidence bounds: a policy would find the plans that the surrogate overrates."""
        plans = self.problem.counts(allocations, ratios)
        mean, deviation = self.surrogate.predict(keep_fractions(self.groups, plans))
        return self.problem.with_compression(mean - LCB_BETA * deviation, plans)

    def _learn_budgets(self, preferences: Tensor) -> None:
        """The best of a grid of ratios, each with the allocation that the policy chooses there."""
        grid = self.problem.limit * torch.linspace(1 / 30, 1, N_RATIOS)
        ratios = grid.expand(len(preferences), -1)
        with torch.no_grad():
            means = self.learner.allocation_means(preferences, ratios)
        objectives = self._objectives(means.flatten(0, 1), ratios.flatten())
        self.learner.learn_budgets(preferences, ratios, objectives.view(*ratios.shape, 3))
