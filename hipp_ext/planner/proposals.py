"""The plans to measure next: the most promising of many, by draws from the surrogate."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hipp_ext.budget import Bounds, Cost, many_keep_counts
from hipp_ext.groups import Group
from hipp_ext.planner.archive import Archive, hypervolume_gains
from hipp_ext.planner.cost import compression
from hipp_ext.planner.grpo import Learner, Rollouts, centred
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
        groups: groups of the model.
        bounds: bounds of the keep counts.
        cost: what compression counts.
        limit: largest ratio that is searched.
        candidates: number of refined candidates per preference and budget.
    """

    groups: Sequence[Group]
    bounds: Bounds
    cost: Cost
    limit: float
    candidates: int

    def choose(
        self,
        drawn: Rollouts,
        n: int,
        archive: Archive,
        surrogate: Surrogate,
        learner: Learner,
        generator: torch.Generator,
    ) -> Rollouts:
        """`n` rollouts per preference and budget; the policy's `drawn` ones are candidates."""
        ratios = drawn.ratios.clone()
        if ratios.shape[1] > 1:
            ratios[:, 1:] = self._spread(ratios[:, 1:].shape, generator)
            # The policy alone would measure a preference near a task's corner at tiny ratios only.
            ratios[1::2, 0] = self._spread(ratios[1::2, 0].shape, generator)
        chosen = torch.empty(*ratios.shape, n, drawn.allocations.shape[-1])
        front = np.array([r.reward.objectives() for r in archive.front()]).reshape(-1, 3)
        logits = torch.tensor([r.allocation for r in archive.records])
        asked = np.array([r.pruning_ratio for r in archive.records])
        known = set(map(tuple, self.counts(logits, asked).tolist()))
        measured = torch.unique(logits, dim=0)
        for p, preference in enumerate(drawn.preferences):
            for m, ratio in enumerate(ratios[p].tolist()):
                start = torch.cat([drawn.allocations[p, m], centred(measured)])
                merit = _Merit(preference=preference, front=front if m else None, learner=learner)
                pool = self._refine(start, ratio, merit, surrogate, drawn.noise, generator)
                pool = torch.cat([pool, drawn.allocations[p, m, : self.candidates // 4]])
                chosen[p, m] = self._pick(pool, n, ratio, merit, known, surrogate, generator)
            # The policy's own plan is measured too, or the policy would drift to unknown regions.
            own = learner.allocation_means(preference[None], ratios[p : p + 1, :1])
            chosen[p, 0, 0] = own[0, 0].detach()
        return dataclasses.replace(drawn, ratios=ratios, allocations=chosen)

    def counts(
        self, allocations: Float[Tensor, "C G"], ratios: float | Float[Tensor, " C"] | np.ndarray
    ) -> np.ndarray:
        """Keep counts of plans, before the rest of the budget that rounding leaves is spent."""
        each = np.broadcast_to(np.asarray(ratios, dtype=np.float64), len(allocations))
        return many_keep_counts(self.groups, allocations.double().numpy(), each, self.bounds)

    def _spread(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Ratios over the whole range, one in each of as many parts of equal probability.

        The probability grows with the ratio: at small ratios, all allocations are nearly alike.
        """
        within = torch.rand(shape, generator=generator)
        part = torch.arange(within.numel()).view(shape)
        # Slightly beyond the end, because the front's last plan is at the largest ratio.
        return (((part + within) / within.numel()).sqrt() * 1.02 * self.limit).clamp(max=self.limit)

    def _refine(
        self,
        pool: Tensor,
        ratio: float,
        merit: "_Merit",
        surrogate: Surrogate,
        noise: float,
        generator: torch.Generator,
    ) -> Float[Tensor, "C G"]:
        """Rounds of selecting the most promising candidates and changing some of their logits."""
        for scale in REFINE_NOISE:
            counts = self.counts(pool, ratio)
            mean = surrogate.mean(keep_fractions(self.groups, counts))
            value = merit(torch.cat([mean, self._compression(counts)], 1))
            best = pool[value.topk(min(len(pool), self.candidates // 8)).indices]
            parents = best[torch.randint(len(best), (self.candidates,), generator=generator)]
            rate = max(0.2, 2 / parents.shape[1])
            changed = torch.rand(parents.shape, generator=generator) < rate
            moves = scale * noise * torch.randn(parents.shape, generator=generator)
            pool = torch.cat([best, parents + changed * moves])
        return pool

    def _compression(self, counts: np.ndarray) -> Float[Tensor, "C 1"]:
        return compression(self.cost, self.groups, counts)[:, None].float()

    def _pick(
        self,
        pool: Float[Tensor, "C G"],
        n: int,
        ratio: float,
        merit: "_Merit",
        known: set[tuple[int, ...]],
        surrogate: Surrogate,
        generator: torch.Generator,
    ) -> Float[Tensor, "N G"]:
        """`n` different plans, each the best under its own draw from the surrogate."""
        counts = self.counts(pool, ratio)
        fresh = {
            tuple(counted): i
            for i, counted in reversed(list(enumerate(counts.tolist())))
            if tuple(counted) not in known
        }
        usable = sorted(fresh.values())  # known plans and duplicates teach nothing
        usable += [i for i in range(len(pool)) if i not in set(usable)][: max(0, n - len(usable))]
        pool, counts = pool[usable], counts[usable]
        saved, taken = self._compression(counts), list[int]()
        for drawn in surrogate.sample(keep_fractions(self.groups, counts), n, generator):
            objectives = torch.cat([drawn, saved], 1)
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
