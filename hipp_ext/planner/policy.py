"""The policy: state tokens + preference -> a budget and an allocation, in one call."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.planner.state import FEATURES, Signals
from hipp_ext.preference import Preference

MAX_RATIO = 0.6  # largest pruning_ratio that a policy chooses and that a fit searches
PRIOR_SHARPNESS = 0.5  # of the soft prior
VISUAL_WEIGHT = 0.25
MIN_COMPRESSION_WEIGHT = 0.03  # the logit diverges at 0
N_SEGMENTS = 8  # of the compression weight, each with a slope of its own
SOFTPLUS_INV_1 = math.log(math.e - 1)  # softplus of it is 1


class Policy(nn.Module):
    """State tokens and a preference -> a budget and an allocation; untrained it equals its prior.

    It is permutation-equivariant over groups, and hierarchical: the budget head decides how much is
    removed, and the allocation head, which sees the budget, decides where. Both add a
    zero-initialised residual to a prior.

    Prior of the budget: MAX_RATIO times the compression weight. The head shifts it and stretches it
    with a positive slope on each of N_SEGMENTS intervals, so that the budget is monotone in the
    compression weight at a fixed utility : robustness ratio.

    Prior of the allocation: the allocator `Sensitivity` at the budget, with the losses of the two
    tasks weighted as the preference divides between them. A policy in training starts from a softer
    prior, log-linear in the sensitivity: from the sharp one, which jumps from budget to budget,
    fitted policies separated preferences less well. Both priors keep a little more of groups with
    high visual sensitivity, in proportion to the weight of robustness.

    Args:
        width: width of the hidden layers.
        features: number of features of a state token, see `Signals.state`.

    Source: HiPP-Prune (arXiv 2603.06270, abstract): global budget, then layer-wise allocation,
    preference conditioning.
    Differs from the paper: architecture and prior are ours; the paper's are not public.
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
        self.budget_head = nn.Linear(width + 2, 1 + N_SEGMENTS)
        self.allocation_head = nn.Linear(width, 1)
        for head in (self.budget_head, self.allocation_head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def start_learning(self) -> None:
        """Use the soft prior from now on."""
        self.learns.fill_(True)

    def budget(
        self, signals: Signals, preferences: Float[Tensor, "batch 3"]
    ) -> Float[Tensor, " batch"]:
        """Mean logit of pruning_ratio / MAX_RATIO for each preference."""
        tasks = _tasks(preferences)
        pooled = self._tokens(signals, tasks, torch.zeros(len(tasks))).mean(1)
        shift, stretch = self.budget_head(torch.cat([pooled, tasks], 1)).split([1, N_SEGMENTS], 1)
        knots = torch.linspace(MIN_COMPRESSION_WEIGHT, 1 - MIN_COMPRESSION_WEIGHT, N_SEGMENTS + 1)
        reached = torch.logit(preferences[:, 2:].clamp(knots[:-1], knots[1:]))
        climbed = nn.functional.softplus(stretch + SOFTPLUS_INV_1) * (
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

        A plan does not change when all its logits move together, so the residual has zero mean:
        otherwise its mean would drift.
        """
        tasks = _tasks(preferences)  # the ratio stands for the weight of compression
        tokens = self._tokens(signals, tasks, ratios)
        robustness = tasks[:, 1]
        sharp = not bool(self.learns)
        sensitivity = (
            signals.prior(ratios, robustness) if sharp else PRIOR_SHARPNESS * signals.soft_prior
        )
        prior = sensitivity + VISUAL_WEIGHT * robustness[:, None] * signals.visual_rank
        residual = self.allocation_head(tokens).squeeze(-1)
        return prior + residual - residual.mean(1, keepdim=True)

    def _tokens(
        self, signals: Signals, tasks: Float[Tensor, "batch 2"], ratios: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch groups width"]:
        x = self.embed(signals.state).expand(len(tasks), -1, -1)
        film = self.condition(torch.cat([tasks, ratios[:, None]], 1))
        film = film.view(len(tasks), len(self.blocks), 2, 1, self.width)
        for i, block in enumerate(self.blocks):
            scale, shift = film[:, i].unbind(1)
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
            signals: signals of the model.
            preference: weights of the objectives.
            pruning_ratio: fixes the budget; None: the budget head decides.
            limit: largest ratio that can be met; the budget head's ratio is cut to it.
        """
        preferences = torch.tensor([preference.as_tuple()])
        if pruning_ratio is None:
            pruning_ratio = min(ratio_of(float(self.budget(signals, preferences))), limit)
        logits = self.allocation(signals, preferences, torch.tensor([pruning_ratio]))
        return pruning_ratio, logits[0].tolist()


def _tasks(preferences: Float[Tensor, "batch 3"]) -> Float[Tensor, "batch 2"]:
    """(utility, robustness) weights, which sum to one; 1/2 each where neither counts."""
    utility, robustness, _ = preferences.unbind(-1)
    both = utility + robustness
    robustness = torch.where(both > 0, robustness / both, 0.5)
    return torch.stack([1 - robustness, robustness], 1)


def ratio_of(budget: float) -> float:
    """Budget logit -> pruning_ratio in (0, MAX_RATIO)."""
    # Below -700, exp would overflow; NaN stays NaN.
    return MAX_RATIO / (1 + math.exp(-max(budget, -700.0)))


def new_policy(seed: int = 0, **options: Any) -> Policy:
    """An untrained policy, the same for the same seed; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Policy(**options)
