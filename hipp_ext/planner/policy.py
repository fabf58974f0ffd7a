"""The policy: state tokens + preference -> a budget and an allocation, in one call."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.planner.state import FEATURES, Signals
from hipp_ext.preference import Preference

MAX_RATIO = 0.6  # the most that a policy removes of its own accord, for compression alone; and the most that fits look at
PRIOR_SHARPNESS = 0.5  # of the soft prior
VISUAL_WEIGHT = 0.25
LEAST_WISH = 0.03  # compression is taken to be wanted at least this much: logits to the corner itself have no end
PIECES = 8  # of the wish for compression, each with a slope of its own
UNSTRETCHED = math.log(math.e - 1)  # softplus of it is 1


class Policy(nn.Module):
    """Permutation-equivariant over groups, conditioned on the preference; untrained it equals its prior.

    Hierarchical: the budget head decides how much goes; the allocation head, told the budget, decides where. Both change a
    prior by a zero-initialised residual. Prior of the budget: MAX_RATIO times the preference for compression, a little off
    both ends; the head shifts it and stretches it piece by piece, so that whoever wants more compression, with the rest
    divided between the tasks as before, never gets less. Prior of the allocation: the one whose measured losses sum to the
    least at the budget, losses on the two tasks weighted as the preference divides between them. A policy that learns leaves
    from a softer one, log-linear in the sensitivity of both: from the sharp one, which jumps from budget to budget, fits
    told preferences apart worse. Either keeps groups of high visual sensitivity a little more, the more robustness is wanted.

    Args:
        width: of the hidden layers.
        features: of a state token, see `Signals.state`.

    Source: HiPP-Prune (arXiv 2603.06270, abstract): global budget, then layer-wise allocation, preference conditioning.
    Differs from the paper: architecture and prior are ours, the paper's are not public.
    """

    learns: Tensor

    def __init__(self, width: int = 64, features: int = FEATURES):
        super().__init__()
        self.width, self.features = width, features
        self.register_buffer("learns", torch.tensor(False))
        self.embed = nn.Linear(features, width)
        self.condition = nn.Linear(3, 4 * width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(2)
        )
        self.budget_head = nn.Linear(width + 2, 1 + PIECES)
        self.allocation_head = nn.Linear(width, 1)
        for head in (self.budget_head, self.allocation_head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def start_learning(self) -> None:
        """Leave from the soft prior from now on."""
        self.learns.fill_(True)

    def budget(
        self, signals: Signals, preferences: Float[Tensor, "batch 3"]
    ) -> Float[Tensor, " batch"]:
        """Mean logit of pruning_ratio / MAX_RATIO for each preference; at the same lean it rises with the wish to compress."""
        tasks = _tasks(preferences)
        pooled = self._tokens(signals, tasks, torch.zeros(len(tasks))).mean(1)
        shift, stretch = self.budget_head(torch.cat([pooled, tasks], 1)).split([1, PIECES], 1)
        knots = torch.linspace(LEAST_WISH, 1 - LEAST_WISH, PIECES + 1)
        reached = torch.logit(preferences[:, 2:].clamp(knots[:-1], knots[1:]))
        climbed = nn.functional.softplus(stretch + UNSTRETCHED) * (
            reached - torch.logit(knots[:-1])
        )
        return torch.logit(knots[0]) + shift[:, 0] + climbed.sum(1)

    def allocation(
        self,
        signals: Signals,
        preferences: Float[Tensor, "batch 3"],
        ratios: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch groups"]:
        """Mean logit per group for each preference and pruning_ratio.

        A plan does not change when all its logits move together, so the residual's mean is taken out: nothing would hold it.
        """
        tasks = _tasks(
            preferences
        )  # and no more of the preference: how much compression counts is said by the ratio
        tokens = self._tokens(signals, tasks, ratios)
        leans = tasks[:, 1]
        sensitivity = (
            PRIOR_SHARPNESS * signals.soft_prior
            if bool(self.learns)
            else signals.prior(ratios, leans)
        )
        prior = sensitivity + VISUAL_WEIGHT * leans[:, None] * signals.visual_rank
        residual = self.allocation_head(tokens).squeeze(-1)
        return prior + residual - residual.mean(1, keepdim=True)

    def _tokens(
        self, signals: Signals, tasks: Float[Tensor, "batch 2"], ratios: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch groups width"]:
        x = self.embed(signals.state).expand(len(tasks), -1, -1)
        film = self.condition(torch.cat([tasks, ratios[:, None]], 1)).view(
            len(tasks), 2, 2, 1, self.width
        )
        for block, (scale, shift) in zip(
            self.blocks, (film[:, 0].unbind(1), film[:, 1].unbind(1)), strict=True
        ):
            everyone = x.mean(1, keepdim=True).expand_as(x)
            x = x + (1 + scale) * block(torch.cat([x, everyone], -1)) + shift
        return x

    @torch.no_grad()
    def decide(
        self,
        signals: Signals,
        preference: Preference,
        pruning_ratio: float | None = None,
        limit: float = 1.0,
    ) -> tuple[float, list[float]]:
        """(pruning_ratio, allocation logits) for one preference: the policy call that makes a plan.

        Args:
            pruning_ratio: fixes the budget; None: the budget head decides.
            limit: largest ratio that can be met; the budget head's wish is cut to it.
        """
        wanted = torch.tensor([preference.as_tuple()])
        if pruning_ratio is None:
            pruning_ratio = min(ratio_of(float(self.budget(signals, wanted))), limit)
        return pruning_ratio, self.allocation(signals, wanted, torch.tensor([pruning_ratio]))[
            0
        ].tolist()


def lean(preferences: Float[Tensor, "batch 3"]) -> Float[Tensor, " batch"]:
    """How the wish is divided between the tasks: 0 is all utility, 1 all robustness, 1/2 where neither counts."""
    utility, robustness, _ = preferences.unbind(-1)
    both = utility + robustness
    return torch.where(both > 0, robustness / both, 0.5)


def _tasks(preferences: Float[Tensor, "batch 3"]) -> Float[Tensor, "batch 2"]:
    """How much each task counts beside the other."""
    wanted = lean(preferences)
    return torch.stack([1 - wanted, wanted], 1)


def ratio_of(budget: float) -> float:
    """Budget logit -> pruning_ratio in (0, MAX_RATIO)."""
    return MAX_RATIO / (
        1 + math.exp(-max(budget, -700.0))
    )  # below, exp is beyond a float; NaN stays NaN


def new_policy(seed: int = 0, **options: Any) -> Policy:
    """An untrained policy, the same for the same seed; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Policy(**options)
