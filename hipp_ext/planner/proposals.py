"""The plans to measure next: the most promising of many, by draws from the surrogate."""

import dataclasses

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hipp_ext.planner.archive import Archive, hypervolume_gains
from hipp_ext.planner.grpo import Learner, Rollouts, centred
from hipp_ext.planner.problem import FitProblem
from hipp_ext.planner.state import keep_fractions
from hipp_ext.planner.surrogate import Surrogate

REFINE_NOISE = (1.5, 1.0, 0.5)  # of each round, in units of the rollouts' noise
NO_GAIN_PENALTY = 1e3  # ranks plans that add nothing to the front behind those that do


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposer:
    """Chooses rollouts among candidates by draws from the surrogate (Thompson sampling).

    At the first budget of a preference, the rollouts are those that should be best for the
    preference; that budget is the policy's or, for every other preference, any. The other budgets
    are spread over the whole range, denser at high ratios, and their rollouts are those that should
    add most to the front's hypervolume.

    Attributes:
        problem: plans that are searched, and settings of the fit.
        surrogate: surrogate that is fitted to the evaluated plans.
        learner: the policy and its updates.
    """

    problem: FitProblem
    surrogate: Surrogate
    learner: Learner

    def choose(self, drawn: Rollouts, archive: Archive, generator: torch.Generator) -> Rollouts:
        """The rollouts to measure; the policy's `drawn` ones are candidates."""
        settings = self.problem.settings
        ratios = drawn.ratios.clone()
        if ratios.shape[1] > 1:
            ratios[:, 1:] = self._spread(ratios[:, 1:].shape, generator)
            # The policy alone would measure a preference near a task's corner at tiny ratios only.
            ratios[1::2, 0] = self._spread(ratios[1::2, 0].shape, generator)
        chosen = torch.empty(*ratios.shape, settings.rollouts, drawn.allocations.shape[-1])
        front = np.array([r.reward.objectives() for r in archive.front()]).reshape(-1, 3)
        logits = torch.tensor([r.allocation for r in archive.records])
        asked = np.array([r.pruning_ratio for r in archive.records])
        known = set(map(tuple, self.problem.counts(logits, asked).tolist()))
        measured = torch.unique(logits, dim=0)
        for p, preference in enumerate(drawn.preferences):
            for m, ratio in enumerate(ratios[p].tolist()):
                start = torch.cat([drawn.allocations[p, m], centred(measured)])
                merit = _Merit(
                    preference=preference, front=front if m else None, learner=self.learner
                )
                pool = self._refine(start, ratio, merit, drawn.noise, generator)
                pool = torch.cat([pool, drawn.allocations[p, m, : settings.candidates // 4]])
                chosen[p, m] = self._pick(pool, ratio, merit, known, generator)
            # The policy's own plan is measured too, or the policy would drift to unknown regions.
            own = self.learner.allocation_means(preference[None], ratios[p : p + 1, :1])
            chosen[p, 0, 0] = own[0, 0].detach()
        return dataclasses.replace(drawn, ratios=ratios, allocations=chosen)

    def _spread(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Ratios over the whole range, one in each of as many parts of equal probability.

        The probability grows with the ratio: at small ratios, all allocations are nearly alike.
        """
        limit, within = self.problem.limit, torch.rand(shape, generator=generator)
        part = torch.arange(within.numel()).view(shape)
        # Slightly beyond the end, because the front's last plan is at the largest ratio.
        return (((part + within) / within.numel()).sqrt() * 1.02 * limit).clamp(max=limit)

    def _refine(
        self, pool: Tensor, ratio: float, merit: "_Merit", noise: float, generator: torch.Generator
    ) -> Float[Tensor, "C G"]:
        """Rounds of selecting the most promising candidates and changing some of their logits."""
        candidates = self.problem.settings.candidates
        for scale in REFINE_NOISE:
            counts = self.problem.counts(pool, ratio)
            mean = self.surrogate.mean(keep_fractions(self.problem.signals.groups, counts))
            value = merit(self.problem.with_compression(mean, counts))
            best = pool[value.topk(min(len(pool), candidates // 8)).indices]
            parents = best[torch.randint(len(best), (candidates,), generator=generator)]
            rate = max(0.2, 2 / parents.shape[1])
            changed = torch.rand(parents.shape, generator=generator) < rate
            moves = scale * noise * torch.randn(parents.shape, generator=generator)
            pool = torch.cat([best, parents + changed * moves])
        return pool

    def _pick(
        self,
        pool: Float[Tensor, "C G"],
        ratio: float,
        merit: "_Merit",
        known: set[tuple[int, ...]],
        generator: torch.Generator,
    ) -> Float[Tensor, "N G"]:
        """Different plans, each the best under its own draw from the surrogate."""
        n, counts = self.problem.settings.rollouts, self.problem.counts(pool, ratio)
        fresh = {
            tuple(counted): i
            for i, counted in reversed(list(enumerate(counts.tolist())))
            if tuple(counted) not in known
        }
        usable = sorted(fresh.values())  # known plans and duplicates teach nothing
        usable += [i for i in range(len(pool)) if i not in set(usable)][: max(0, n - len(usable))]
        pool, counts = pool[usable], counts[usable]
        fractions, taken = keep_fractions(self.problem.signals.groups, counts), list[int]()
        drawn = self.surrogate.sample(fractions, n, generator)
        for objectives in self.problem.with_compression(drawn, counts):
            value = merit(objectives)
            value[taken] = -torch.inf
            taken.append(int(value.argmax()))
            merit = merit.after(objectives[taken[-1]])
        return pool[taken]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Merit:
    """Objectives -> the value of a plan: to the preference or, with a front, to its hypervolume.

    Plans that add nothing to the front are ranked by their value to the preference.
    """

    preference: Tensor
    front: np.ndarray | None
    learner: Learner

    def __call__(self, objectives: Float[Tensor, "C 3"]) -> Float[Tensor, " C"]:
        value = self.learner.value(objectives, self.preference.expand_as(objectives))
        if self.front is None:
            return value
        gains = hypervolume_gains(objectives, self.front).float()
        return torch.where(gains > 0, gains, value - NO_GAIN_PENALTY)

    def after(self, objectives: Float[Tensor, " 3"]) -> "_Merit":
        """The merit of a further plan when one with these objectives is chosen."""
        if self.front is None:
            return self
        return dataclasses.replace(
            self, front=np.concatenate([self.front, objectives[None].double().numpy()])
        )
