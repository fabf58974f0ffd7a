"""Policy updates: rollouts are whole plans, compared with other rollouts for the same preference.

This is surrogate-assisted, plan-level policy search with the updates of GRPO. What differs from
GRPO as published for text (arXiv 2402.03300), and why:

1. An episode is one action, a Gaussian over a budget and one logit per group, so there is no
   token-level ratio.
2. There is one on-policy update per batch: the ratio is 1 and needs no clipping. The KL penalty to
   the initial policy bounds the logits: once groups are far apart, plans no longer change and the
   reward cannot bring them back.
3. The rollouts of an update are scored by a surrogate that has learned from every measured plan.
   Measured plans are few and expensive, and teach the surrogate, not the policy.
4. An allocation is compared with others for the same preference and budget. The budget head has no
   policy gradient: it is regressed on the best of a grid of budgets.
5. Advantages are normalised per objective and weighted by the preference afterwards (GDPO, arXiv
   2601.05242), with a floor: an objective that is constant within the comparison, as compression
   is, carries noise and counts as zero.
6. The final advantage is not divided by its standard deviation again (Dr. GRPO, arXiv 2503.20783).
7. The common part of an allocation's logits changes no plan: it is left out of likelihood and
   policy, where it would drift.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hipp_ext.planner.policy import MAX_RATIO, Policy
from hipp_ext.planner.reward import DEFAULT_ENDS, scalarise
from hipp_ext.planner.state import Signals

NOISE_FLOOR = 1e-3  # an objective that varies less than this within a comparison does not count
TEMPERATURE = 0.01  # a budget that is worth this much less has 1/e of the weight in the regression
KL_WEIGHT = 0.003  # of the divergence from the initial policy
OFF_TASK_WEIGHT = 0.2  # of each task in an advantage, even where the preference gives it none


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Plans for one update; P preferences, M budgets, N allocations, G groups.

    Attributes:
        preferences: points on the simplex.
        ratios: pruning_ratio of each budget.
        allocations: logits per group.
        noise: standard deviation of the allocations.
    """

    preferences: Float[Tensor, "P 3"]
    ratios: Float[Tensor, "P M"]
    allocations: Float[Tensor, "P M N G"]
    noise: float


class Learner:
    """A policy, its optimizer, and its updates.

    Args:
        policy: policy to be trained.
        signals: signals of the model.
        lr: learning rate of Adam.

    Attributes:
        reference: the policy as it was in the beginning.
        ends: (nadir, ideal) point of the objectives, as far as it is known.
    """

    def __init__(self, policy: Policy, signals: Signals, lr: float):
        policy.start_learning()
        self.policy, self.signals, self.reference = policy, signals, copy.deepcopy(policy)
        self.ends: Tensor = DEFAULT_ENDS
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=lr)

    def value(
        self, objectives: Float[Tensor, "*batch 3"], preferences: Float[Tensor, "*batch 3"]
    ) -> Float[Tensor, " *batch"]:
        """Scalarised objectives, higher = better for the preference."""
        return scalarise(objectives, preferences, self.ends)

    def restart(self) -> None:
        """Go back to the initial policy and reset the optimizer."""
        self.policy.load_state_dict(self.reference.state_dict())
        self.optimizer.state.clear()

    def set_lr(self, lr: float) -> None:
        """Set the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def draw(
        self,
        preferences: Tensor,
        budgets: int,
        rollouts: int,
        *,
        noise: float,
        budget_noise: float,
        ratio: float | Float[Tensor, "P M"] | None,
        limit: float,
        generator: torch.Generator,
    ) -> Rollouts:
        """On-policy rollouts.

        Args:
            preferences: (P, 3) points on the simplex.
            budgets: budgets per preference.
            rollouts: allocations per budget.
            noise: standard deviation of the allocation logits.
            budget_noise: standard deviation of the budget logit.
            ratio: fixes the budgets; None: the budget head decides.
            limit: largest ratio that the bounds allow.
            generator: source of the noise.
        """
        mean = self.policy.budget(self.signals, preferences)[:, None]
        logits = mean + budget_noise * torch.randn(len(preferences), budgets, generator=generator)
        ratios = (
            (MAX_RATIO * torch.sigmoid(logits)).clamp(max=limit)
            if ratio is None
            else torch.zeros_like(logits) + ratio
        )
        means = self.allocation_means(preferences, ratios)
        drawn = torch.randn(*means.shape[:2], rollouts, means.shape[2], generator=generator)
        allocations = means[:, :, None] + noise * drawn
        return Rollouts(
            preferences=preferences, ratios=ratios, allocations=allocations, noise=noise
        )

    def allocation_means(
        self, preferences: Tensor, ratios: Float[Tensor, "P M"], policy: Policy | None = None
    ) -> Float[Tensor, "P M G"]:
        """Mean allocation of each preference at each of its ratios; of the policy by default."""
        flat = preferences.repeat_interleave(ratios.shape[1], 0)
        policy = policy or self.policy
        return policy.allocation(self.signals, flat, ratios.flatten()).view(*ratios.shape, -1)

    def learn(self, rollouts: Rollouts, objectives: Float[Tensor, "P M N 3"]) -> None:
        """One GRPO update of the allocation."""
        with torch.enable_grad():  # the caller may have switched gradients off
            means = self.allocation_means(rollouts.preferences, rollouts.ratios)
            apart = centred(rollouts.allocations - means[:, :, None])
            log_likelihood = -apart.square().mean(-1) / (2 * rollouts.noise**2)
            advantages = allocation_advantages(objectives, rollouts.preferences)
            loss = -(advantages * log_likelihood).mean()
            with torch.no_grad():
                reference = self.allocation_means(
                    rollouts.preferences, rollouts.ratios, self.reference
                )
            loss = loss + KL_WEIGHT * (means - reference).square().mean() / (2 * rollouts.noise**2)
            self._update(loss)

    def learn_budgets(
        self,
        preferences: Float[Tensor, "P 3"],
        ratios: Float[Tensor, "P K"],
        objectives: Float[Tensor, "P K 3"],
    ) -> None:
        """Regress the budget head on the best of K ratios for each preference."""
        value = self.value(objectives, preferences[:, None].expand_as(objectives))
        budgets = torch.logit((ratios / MAX_RATIO).clamp(0.01, 0.99))
        target = (torch.softmax(value / TEMPERATURE, 1) * budgets).sum(1)
        with torch.enable_grad():
            self._update(((self.policy.budget(self.signals, preferences) - target) ** 2).mean())

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Policy, reference and optimizer as named tensors, for a checkpoint."""
        adam = self.optimizer.state_dict()["state"]
        parts = {"policy": self.policy.state_dict(), "reference": self.reference.state_dict()}
        parts |= {f"adam.{index}": moments for index, moments in adam.items()}
        return {f"{p}.{k}": v.contiguous() for p, part in parts.items() for k, v in part.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `tensors` returned."""
        parts: dict[str, Any] = {"policy": {}, "reference": {}, "adam": {}}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            parts[part][name] = value
        self.policy.load_state_dict(parts["policy"])
        self.reference.load_state_dict(parts["reference"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in parts["adam"].items():
            index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})


def draw_preferences(n: int, generator: torch.Generator) -> Float[Tensor, "n 3"]:
    """`n` points on the simplex: every other one uniform, the others near its edges and corners."""
    drawn = -torch.rand(n, 3, generator=generator).clamp_min(1e-9).log()
    axis = torch.randint(3, (n,), generator=generator)
    corner = torch.rand(n, generator=generator) < 0.5
    one = torch.nn.functional.one_hot(axis, 3)
    # Near the corners, not on them: where neither task counts, all allocations are equally good.
    close = 0.02 * torch.rand(n, 1, generator=generator)
    boundary = torch.where(corner[:, None], one + close, drawn * (1 - one))
    drawn[1::2] = boundary[1::2]
    return drawn / drawn.sum(1, keepdim=True)


def allocation_advantages(
    objectives: Float[Tensor, "P M N 3"], preferences: Float[Tensor, "P 3"]
) -> Float[Tensor, "P M N"]:
    """Advantage of each allocation over the others for the same preference and budget.

    Per objective it is (value - mean) / deviation, zero where the deviation is below NOISE_FLOOR;
    then weighted by how the preference divides between the two tasks, since the weight of
    compression does not say where to prune. Each task has at least a small weight, or it would be
    given away for next to nothing.
    """
    tasks = preferences[:, :2] + OFF_TASK_WEIGHT * preferences[:, :2].sum(1, keepdim=True) + 1e-6
    tasks = tasks / tasks.sum(1, keepdim=True)
    above = objectives - objectives.mean(2, keepdim=True)
    deviation = objectives.std(2, unbiased=False, keepdim=True)
    scores = torch.where(deviation > NOISE_FLOOR, above / deviation.clamp_min(NOISE_FLOOR), 0.0)
    return (scores[..., :2] * tasks[:, None, None]).sum(-1)


def centred(logits: Float[Tensor, "*batch G"]) -> Float[Tensor, "*batch G"]:
    """The logits without their mean over the groups, which changes no plan."""
    return logits - logits.mean(-1, keepdim=True)
