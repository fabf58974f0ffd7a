"""What to measure next: rollouts of the policy or, with a reward model, the most promising of many."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hipp_ext.budget import Bounds, many_keep_counts
from hipp_ext.groups import Group
from hipp_ext.planner.archive import Archive, hypervolume_gains
from hipp_ext.planner.cost import Cost
from hipp_ext.planner.grpo import Learner, Rollouts, centred
from hipp_ext.planner.reward_model import RewardModel
from hipp_ext.planner.state import keep_shares

ROUNDS = (
    1.5,
    1.0,
    0.5,
)  # noise of each round of refining candidates, in units of the rollouts' noise
LAST = 1e3  # ranks plans that add nothing to a front behind all that do


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposer:
    """Chooses rollouts among candidates by draws from the reward model (Thompson sampling).

    At the first budget of a preference, the policy's or, for every other preference, any, rollouts are what should serve
    the preference best; the other budgets are spread over the whole range, the denser the more goes, and their rollouts are
    what should add most to the front's hypervolume.

    Attributes:
        groups, bounds, cost: of the fit.
        limit: the largest ratio that is searched.
        candidates: how many are refined, per preference and budget.
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
        model: RewardModel,
        learner: Learner,
        generator: torch.Generator,
    ) -> Rollouts:
        """`n` rollouts per preference and budget, the policy's own `drawn` ones among their candidates."""
        ratios = drawn.ratios.clone()
        if ratios.shape[1] > 1:
            ratios[:, 1:] = self._spread(ratios[:, 1:].shape, generator)
            # Left to the policy, a preference near the corner of a task is only ever measured where next to nothing goes.
            ratios[1::2, 0] = self._spread(ratios[1::2, 0].shape, generator)
        chosen = torch.empty(*ratios.shape, n, drawn.allocations.shape[-1])
        front = np.array([r.reward.objectives() for r in archive.front()]).reshape(-1, 3)
        logits = torch.tensor([r.allocation for r in archive.records])
        known = set(
            map(
                tuple,
                self._counts(logits, np.array([r.pruning_ratio for r in archive.records])).tolist(),
            )
        )
        measured = torch.unique(logits, dim=0)
        for p, preference in enumerate(drawn.preferences):
            for m, ratio in enumerate(ratios[p].tolist()):
                start = torch.cat([drawn.allocations[p, m], centred(measured)])
                merit = _Merit(preference=preference, front=front if m else None, learner=learner)
                pool = self._refine(start, ratio, merit, model, drawn.noise, generator)
                pool = torch.cat([pool, drawn.allocations[p, m, : self.candidates // 4]])
                chosen[p, m] = self._pick(pool, n, ratio, merit, known, model, generator)
            # What the policy itself would do is measured too, or it would drift to where the reward model knows nothing.
            chosen[p, 0, 0] = learner.allocation_means(preference[None], ratios[p : p + 1, :1])[
                0, 0
            ].detach()
        return dataclasses.replace(drawn, ratios=ratios, allocations=chosen)

    def shares(
        self, allocations: Float[Tensor, "C G"], ratios: float | Float[Tensor, " C"]
    ) -> Float[Tensor, "C G"]:
        """Keep shares of plans that are only imagined."""
        return keep_shares(self.groups, self._counts(allocations, ratios))

    def _counts(
        self, allocations: Float[Tensor, "C G"], ratios: float | Float[Tensor, " C"] | np.ndarray
    ) -> np.ndarray:
        each = np.broadcast_to(np.asarray(ratios, dtype=np.float64), len(allocations))
        return many_keep_counts(self.groups, allocations.double().numpy(), each, self.bounds)

    def _spread(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Ratios over the whole range, one in each of as many parts of equal chance.

        The chance grows with the ratio: where little goes, all allocations are nearly alike.
        """
        within = torch.rand(shape, generator=generator)
        part = torch.arange(within.numel()).view(shape)
        # A little beyond the end: the front's last plan is at the largest ratio itself.
        return (((part + within) / within.numel()).sqrt() * 1.02 * self.limit).clamp(max=self.limit)

    def _refine(
        self,
        pool: Tensor,
        ratio: float,
        merit: "_Merit",
        model: RewardModel,
        noise: float,
        generator: torch.Generator,
    ) -> Float[Tensor, "C G"]:
        """A few rounds of keeping the most promising candidates and changing some of their logits."""
        for scale in ROUNDS:
            shares = self.shares(pool, ratio)
            value = merit(torch.cat([model.mean(shares), self._compression(shares)], 1))
            best = pool[value.topk(min(len(pool), self.candidates // 8)).indices]
            parents = best[torch.randint(len(best), (self.candidates,), generator=generator)]
            changed = torch.rand(parents.shape, generator=generator) < max(
                0.2, 2 / parents.shape[1]
            )
            pool = torch.cat(
                [
                    best,
                    parents
                    + changed * scale * noise * torch.randn(parents.shape, generator=generator),
                ]
            )
        return pool

    def _compression(self, shares: Float[Tensor, "C G"]) -> Float[Tensor, "C 1"]:
        return self.cost.removed(shares)[:, None].float()

    def _pick(
        self,
        pool: Float[Tensor, "C G"],
        n: int,
        ratio: float,
        merit: "_Merit",
        known: set[tuple[int, ...]],
        model: RewardModel,
        generator: torch.Generator,
    ) -> Float[Tensor, "N G"]:
        """`n` different plans, each the one of most merit under its own draw from the reward model."""
        counts = self._counts(pool, ratio)
        fresh = {
            tuple(keeps): i
            for i, keeps in reversed(list(enumerate(counts.tolist())))
            if tuple(keeps) not in known
        }
        usable = sorted(
            fresh.values()
        )  # plans already known teach nothing, and neither do two alike
        usable += [i for i in range(len(pool)) if i not in set(usable)][: max(0, n - len(usable))]
        pool, shares = pool[usable], keep_shares(self.groups, counts[usable])
        compression = self._compression(shares)
        taken: list[int] = []
        for drawn in model.sample(shares, n, generator):
            objectives = torch.cat([drawn, compression], 1)
            value = merit(objectives)
            value[taken] = -torch.inf
            taken.append(int(value.argmax()))
            merit = merit.after(objectives[taken[-1]])
        return pool[taken]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Merit:
    """Objectives -> what a plan would be worth: to the preference or, with a front, to the front's hypervolume.

    Where nothing adds to the front, whatever serves the preference.
    """

    preference: Tensor
    front: np.ndarray | None
    learner: Learner

    def __call__(self, objectives: Float[Tensor, "C 3"]) -> Float[Tensor, " C"]:
        value = self.learner.value(objectives, self.preference.expand_as(objectives))
        if self.front is None:
            return value
        gains = hypervolume_gains(objectives, self.front).float()
        return torch.where(gains > 0, gains, value - LAST)

    def after(self, objectives: Float[Tensor, " 3"]) -> "_Merit":
        """The merit of a further plan when one with these objectives is already chosen."""
        if self.front is None:
            return self
        return dataclasses.replace(
            self, front=np.concatenate([self.front, objectives[None].double().numpy()])
        )
