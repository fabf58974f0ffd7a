"""Plan-level GRPO: rollouts are whole plans, compared with other rollouts for the same preference.

What differs from GRPO as published for text (arXiv 2402.03300), and why:
1. One action per episode, a Gaussian over a budget and one logit per group; so there is no token-level ratio.
2. One on-policy update per batch: the ratio is 1, and clipping has nothing to do. The KL penalty, to where the fit began,
   is small: it holds logits so large that no plan depends on them any more, which would grow without end.
3. Rollouts are imagined: a reward model learned from every measured plan scores them. Measured ones are few and dear, and
   teach the reward model; the policy learns from them directly only where there is none (`FitSettings.imagined` = 0).
4. Two baselines, because the action has two parts: an allocation is compared with others for the same preference and
   budget, a budget with the other budgets for the same preference.
5. Allocation advantages are normalised per objective and weighted by the preference afterwards (GDPO, arXiv 2601.05242),
   with a floor: an objective that is constant within the comparison, as compression is, carries noise and counts as zero.
6. Budget advantages come from one scalarisation for all budgets, of objectives scaled from nadir to ideal point of what was
   measured: z-scores of opposed objectives would cancel. Beside them the budget head is regressed on the best known
   budgets; alone, its gradient runs into saturation.
7. The final advantage is not divided by its standard deviation again (Dr. GRPO, arXiv 2503.20783).
8. Hindsight: every measured plan teaches all preferences, by the reward model; without one, by weighted regression.
9. What all logits of an allocation have in common changes no plan: it is left out of likelihood and policy, where it would
   drift without end.
10. A diversity term keeps preferences apart (D3PO, arXiv 2602.07764): the allocations of two preferences shall differ by
   as much as the preferences do, up to a small margin.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hipp_ext.planner.policy import MAX_RATIO, Policy, lean
from hipp_ext.planner.reward import WHOLE, Scalarisation, scalarise
from hipp_ext.planner.state import Signals

NOISE_FLOOR = 1e-3  # an objective that varies less than this within a comparison does not count
BUDGET_WEIGHT = 0.05  # of the budget's policy gradient beside its regression
TEMPERATURE = (
    0.01  # hindsight: plans whose merit differs by this much differ by a factor e in weight
)
KL_WEIGHT = 0.003  # of the divergence from the policy that the fit began with
OTHER_TASK = 0.2  # weight that a task has in an allocation's advantage even where the preference gives it none
DIVERSITY_WEIGHT, DIVERSITY_MARGIN = (
    0.02,
    0.3,
)  # of the diversity term; margin in logits per unit of preference


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Plans for one update; P preferences, M budgets, N allocations, G groups.

    Attributes:
        preferences: points on the simplex.
        budgets: logits of ratio / MAX_RATIO.
        ratios: pruning ratios that go with them.
        allocations: logits per group.
        budget_noise, noise: standard deviations they were drawn with.
    """

    preferences: Float[Tensor, "P 3"]
    budgets: Float[Tensor, "P M"]
    ratios: Float[Tensor, "P M"]
    allocations: Float[Tensor, "P M N G"]
    budget_noise: float
    noise: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Every plan that was evaluated.

    Attributes:
        ratios: (R,) pruning ratios.
        allocations: (R, G) logits they were made from.
        objectives: (R, 3) utility, robustness, compression.
    """

    ratios: Float[Tensor, " R"]
    allocations: Float[Tensor, "R G"]
    objectives: Float[Tensor, "R 3"]


class Learner:
    """A policy, its optimizer, and the updates that teach it.

    Attributes:
        reference: the policy as it was in the beginning.
        ends: nadir and ideal point of the objectives, as far as they are known.
    """

    def __init__(
        self, policy: Policy, signals: Signals, learning_rate: float, scalarisation: Scalarisation
    ):
        policy.start_learning()
        self.policy, self.signals, self.reference = policy, signals, copy.deepcopy(policy)
        self.scalarisation: Scalarisation = scalarisation
        self.ends: Tensor = WHOLE
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate)

    def value(
        self, objectives: Float[Tensor, "*batch 3"], preferences: Float[Tensor, "*batch 3"]
    ) -> Float[Tensor, " *batch"]:
        """What plans are worth to preferences."""
        return scalarise(objectives, preferences, self.scalarisation, self.ends)

    def restart(self) -> None:
        """Go back to the beginning, and forget the optimizer's moments."""
        self.policy.load_state_dict(self.reference.state_dict())
        self.optimizer.state.clear()

    def set_learning_rate(self, rate: float) -> None:
        """Of the updates to come."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

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
        """On-policy rollouts; `ratio` fixes the budgets, `limit` is the largest ratio the bounds allow."""
        mean = self.policy.budget(self.signals, preferences)[:, None]
        logits = mean + budget_noise * torch.randn(len(preferences), budgets, generator=generator)
        ratios = (
            (MAX_RATIO * torch.sigmoid(logits)).clamp(max=limit)
            if ratio is None
            else torch.zeros_like(logits) + ratio
        )
        means = self.allocation_means(preferences, ratios)
        drawn = torch.randn(*means.shape[:2], rollouts, means.shape[2], generator=generator)
        return Rollouts(
            preferences=preferences,
            budgets=logits,
            ratios=ratios,
            allocations=means[:, :, None] + noise * drawn,
            noise=noise,
            budget_noise=budget_noise,
        )

    def allocation_means(
        self, preferences: Tensor, ratios: Float[Tensor, "P M"]
    ) -> Float[Tensor, "P M G"]:
        """Mean allocation of each preference at each of its ratios."""
        return self._means(self.policy, preferences, ratios)

    def _means(
        self, policy: Policy, preferences: Tensor, ratios: Float[Tensor, "P M"]
    ) -> Float[Tensor, "P M G"]:
        flat = preferences.repeat_interleave(ratios.shape[1], 0)
        return policy.allocation(self.signals, flat, ratios.flatten()).view(*ratios.shape, -1)

    def learn(
        self, rollouts: Rollouts, objectives: Float[Tensor, "P M N 3"], *, budget: bool
    ) -> None:
        """One GRPO update; `budget`: whether the budget head learns too."""
        with torch.enable_grad():  # whatever the caller, or a library it imported, has switched off
            means = self.allocation_means(rollouts.preferences, rollouts.ratios)
            log_likelihood = -centred(rollouts.allocations - means[:, :, None]).square().mean(
                -1
            ) / (2 * rollouts.noise**2)
            loss = -(
                allocation_advantages(objectives, rollouts.preferences) * log_likelihood
            ).mean()
            loss = loss + DIVERSITY_WEIGHT * _collapse(means, rollouts.preferences)
            with torch.no_grad():
                reference = self._means(self.reference, rollouts.preferences, rollouts.ratios)
            loss = loss + KL_WEIGHT * (means - reference).square().mean() / (2 * rollouts.noise**2)
            if budget and rollouts.budgets.shape[1] > 1:
                mean = self.policy.budget(self.signals, rollouts.preferences)[:, None]
                log_likelihood = -((rollouts.budgets - mean) ** 2) / (2 * rollouts.budget_noise**2)
                advantages = self.budget_advantages(objectives, rollouts.preferences)
                loss = loss - BUDGET_WEIGHT * (advantages * log_likelihood).mean()
            self._update(loss)

    def budget_advantages(
        self, objectives: Float[Tensor, "P M N 3"], preferences: Float[Tensor, "P 3"]
    ) -> Float[Tensor, "P M"]:
        """Advantage of each budget over the others for the same preference: scalarised means over its allocations."""
        return _normalised(
            self.value(
                objectives.mean(2), preferences[:, None].expand(-1, objectives.shape[1], -1)
            ),
            1,
        )

    def learn_budgets(
        self,
        preferences: Float[Tensor, "P 3"],
        ratios: Float[Tensor, "P K"],
        objectives: Float[Tensor, "P K 3"],
    ) -> None:
        """Regress the budget head on the ratios, among K known outcomes, that serve each preference best."""
        value = self.value(objectives, preferences[:, None].expand_as(objectives))
        budgets = torch.logit((ratios / MAX_RATIO).clamp(0.01, 0.99))
        target = (torch.softmax(value / TEMPERATURE, 1) * budgets).sum(1)
        with torch.enable_grad():
            self._update(((self.policy.budget(self.signals, preferences) - target) ** 2).mean())

    def learn_in_hindsight(
        self, measured: Measured, generator: torch.Generator, draws: int = 16, window: float = 0.08
    ) -> None:
        """Move towards the measured plans that serve a preference best among those of about the same budget."""
        preferences = draw_preferences(draws, generator)
        centres = measured.ratios[
            torch.randint(len(measured.ratios), (draws,), generator=generator)
        ]
        near = (measured.ratios[None] - centres[:, None]).abs() <= window
        weights = preferences[:, :2] / preferences[:, :2].sum(1, keepdim=True).clamp_min(1e-6)
        # Less pruning is always easier: what remains after the trend over the window is the merit of the allocation.
        merit = _detrend(
            weights @ measured.objectives[:, :2].T, measured.ratios[None].expand(draws, -1), near
        )
        share = torch.softmax((merit / TEMPERATURE).masked_fill(~near, -torch.inf), 1)
        wanted = centred(share @ measured.allocations)
        with torch.enable_grad():
            mean = self.policy.allocation(self.signals, preferences, centres)
            self._update(0.1 * (centred(mean) - wanted).square().mean())

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Policy, reference and optimizer as named tensors, for a checkpoint."""
        tensors = {f"policy.{k}": v for k, v in self.policy.state_dict().items()}
        tensors |= {f"reference.{k}": v for k, v in self.reference.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{k}": v for k, v in moments.items()}
        return {k: v.contiguous() for k, v in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave."""
        for name, policy in (("policy.", self.policy), ("reference.", self.reference)):
            policy.load_state_dict(
                {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}
            )
        state: dict[str, Any] = self.optimizer.state_dict()
        state["state"] = {}
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, index, name = key.split(".")
                state["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(state)


def draw_preferences(n: int, generator: torch.Generator) -> Float[Tensor, "n 3"]:
    """`n` points on the simplex: every other one uniform (Dirichlet(1)), the rest on its edges or in its corners."""
    drawn = -torch.rand(n, 3, generator=generator).clamp_min(1e-9).log()
    axis, corner = (
        torch.randint(3, (n,), generator=generator),
        torch.rand(n, generator=generator) < 0.5,
    )
    one = torch.nn.functional.one_hot(axis, 3)
    # Up to the corners, not on them: where neither task counts, every allocation would be as good as any other.
    close = 0.02 * torch.rand(n, 1, generator=generator)
    boundary = torch.where(corner[:, None], one + close, drawn * (1 - one))
    drawn[1::2] = boundary[1::2]
    return drawn / drawn.sum(1, keepdim=True)


def allocation_advantages(
    objectives: Float[Tensor, "P M N 3"], preferences: Float[Tensor, "P 3"]
) -> Float[Tensor, "P M N"]:
    """Advantage of each allocation over the others for the same preference and budget.

    Per objective: (value - mean) / max(standard deviation, noise floor), zero where the deviation is below the floor;
    then weighted by how the preference divides between the two tasks: how much compression counts says nothing about where.
    A task that does not count at all still counts a little, or it would be given away for next to nothing.
    """
    tasks = preferences[:, :2] + OTHER_TASK * preferences[:, :2].sum(1, keepdim=True) + 1e-6
    tasks = tasks / tasks.sum(1, keepdim=True)
    return (_normalised(objectives, 2)[..., :2] * tasks[:, None, None]).sum(-1)


def centred(logits: Float[Tensor, "*batch G"]) -> Float[Tensor, "*batch G"]:
    """Without what all groups have in common, which changes no plan."""
    return logits - logits.mean(-1, keepdim=True)


def _normalised(values: Tensor, dim: int) -> Tensor:
    above = values - values.mean(dim, keepdim=True)
    deviation = values.std(dim, unbiased=False, keepdim=True)
    return torch.where(deviation > NOISE_FLOOR, above / deviation.clamp_min(NOISE_FLOOR), 0.0)


def _collapse(means: Float[Tensor, "P M G"], preferences: Float[Tensor, "P 3"]) -> Tensor:
    """How far the allocations of different preferences fall short of the distance that they should have."""
    if len(preferences) < 2:
        return means.sum() * 0
    # Only utility against robustness decides where to prune; compression decides how much.
    leans = lean(preferences)
    logits = centred(means[:, 0])
    apart = (logits[:, None] - logits[None]).square().mean(-1).add(1e-9).sqrt()
    wanted = DIVERSITY_MARGIN * (leans[:, None] - leans[None]).abs()
    return (wanted - apart).clamp_min(0).square().mean()


def _detrend(values: Tensor, x: Tensor, member: Tensor) -> Tensor:
    """Residuals of a line through each row's members."""
    m = member.double()
    count = m.sum(1, keepdim=True)
    dx = x - (m * x).sum(1, keepdim=True) / count
    dy = values - (m * values).sum(1, keepdim=True) / count
    slope = (m * dx * dy).sum(1, keepdim=True) / (m * dx * dx).sum(1, keepdim=True).clamp_min(1e-12)
    return (dy - slope * dx).float()
