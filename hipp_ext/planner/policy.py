"""The policy: state tokens + preference -> a budget and an allocation, in one call."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.planner.state import FEATURES, Signals
from hipp_ext.preference import Preference

MAX_RATIO = 0.6  # the most that a policy removes of its own accord, for compression alone; and the most that fits look at
PRIOR_SHARPNESS = 0.5
VISUAL_WEIGHT = 0.25
LEAST_WISH = 0.03  # compression is taken to be wanted at least this much: logits to the corner itself have no end
EVEN = 1e-3  # added to the wish for each task, which decides only where neither counts


class Policy(nn.Module):
    """Permutation-equivariant over groups, conditioned on the preference; untrained it equals its prior.

    Hierarchical: the budget head decides how much goes; the allocation head, told the budget, decides where. Both add a
    zero-initialised residual to a prior. Prior of the budget: MAX_RATIO times the preference for compression, a little off
    both ends. Prior of the allocation: measured sensitivity, with groups of high visual sensitivity kept more, the more
    robustness is wanted.

    Args:
        width: of the hidden layers.
        features: of a state token, see `Signals.state`.

    Source: HiPP-Prune (arXiv 2603.06270, abstract): global budget, then layer-wise allocation, preference conditioning.
    Differs from the paper: architecture and prior are ours, the paper's are not public.
    """

    def __init__(self, width: int = 64, features: int = FEATURES):
        super().__init__()
        self.width, self.features = width, features
        self.embed = nn.Linear(features, width)
        self.condition = nn.Linear(4, 4 * width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(2)
        )
        self.budget_head = nn.Linear(width + 3, 1)
        self.allocation_head = nn.Linear(width, 1)
        for head in (self.budget_head, self.allocation_head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def budget(self, signals: Signals, preferences: Float[Tensor, "batch 3"]) -> Float[Tensor, " batch"]:
        """Mean logit of pruning_ratio / MAX_RATIO for each preference."""
        share = preferences[:, 2].clamp(LEAST_WISH, 1 - LEAST_WISH)
        zero = torch.zeros(len(preferences), 1)
        pooled = self._tokens(signals, torch.cat([preferences, zero], 1)).mean(1)
        return torch.logit(share) + self.budget_head(torch.cat([pooled, preferences], 1)).squeeze(1)

    def allocation(
        self, signals: Signals, preferences: Float[Tensor, "batch 3"], ratios: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch groups"]:
        """Mean logit per group for each preference and pruning_ratio.

        A plan does not change when all its logits move together, so the residual's mean is taken out: nothing would hold it.
        """
        wanted = lean(preferences)
        # Of the preference only the lean: how much compression counts is said by the ratio already.
        tokens = self._tokens(signals, torch.stack([1 - wanted, wanted, torch.zeros_like(wanted), ratios], 1))
        prior = PRIOR_SHARPNESS * signals.prior + VISUAL_WEIGHT * wanted[:, None] * signals.visual_rank
        residual = self.allocation_head(tokens).squeeze(-1)
        return prior + residual - residual.mean(1, keepdim=True)

    def _tokens(self, signals: Signals, condition: Float[Tensor, "batch 4"]) -> Float[Tensor, "batch groups width"]:
        x = self.embed(signals.state).expand(len(condition), -1, -1)
        film = self.condition(condition).view(len(condition), 2, 2, 1, self.width)
        for block, (scale, shift) in zip(self.blocks, (film[:, 0].unbind(1), film[:, 1].unbind(1)), strict=True):
            everyone = x.mean(1, keepdim=True).expand_as(x)
            x = x + (1 + scale) * block(torch.cat([x, everyone], -1)) + shift
        return x

    @torch.no_grad()
    def decide(
        self, signals: Signals, preference: Preference, pruning_ratio: float | None = None, limit: float = 1.0
    ) -> tuple[float, list[float]]:
        """(pruning_ratio, allocation logits) for one preference: the policy call that makes a plan.

        Args:
            pruning_ratio: fixes the budget; None: the budget head decides.
            limit: largest ratio that can be met; the budget head's wish is cut to it.
        """
        wanted = torch.tensor([preference.as_tuple()])
        if pruning_ratio is None:
            pruning_ratio = min(ratio_of(float(self.budget(signals, wanted))), limit)
        return pruning_ratio, self.allocation(signals, wanted, torch.tensor([pruning_ratio]))[0].tolist()


def lean(preferences: Float[Tensor, "batch 3"]) -> Float[Tensor, " batch"]:
    """How the wish is divided between the tasks: 0 is all utility, 1 all robustness, 1/2 where neither counts."""
    utility, robustness, _ = (preferences + EVEN).unbind(-1)
    return robustness / (utility + robustness)


def ratio_of(budget: float) -> float:
    """Budget logit -> pruning_ratio in (0, MAX_RATIO)."""
    return MAX_RATIO / (1 + math.exp(-budget))


def new_policy(seed: int = 0, **options: Any) -> Policy:
    """An untrained policy, the same for the same seed; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Policy(**options)
