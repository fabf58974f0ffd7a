"""Scores, plans and logits that several tests need."""

from collections.abc import Sequence

import torch
from torch import nn

from hipp_ext import PruningPlan
from hipp_ext.budget import keep_counts
from hipp_ext.groups import Group, find_groups, total_parameters
from hipp_ext.units import plan_from_counts


def random_scores(groups: Sequence[Group], seed: int = 0) -> dict[str, torch.Tensor]:
    """One normal number per unit."""
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.randn(g.width, generator=generator) for g in groups}


def random_plan(
    model: nn.Module, ratio: float = 0.4, seed: int = 0, towers=("language",)
) -> PruningPlan:
    """A plan with random scores and a random allocation."""
    generator = torch.Generator().manual_seed(seed)
    groups = find_groups(model, towers)
    scores = {g.name: torch.randn(g.width, generator=generator) for g in groups}
    counts = keep_counts(groups, torch.randn(len(groups), generator=generator).tolist(), ratio)
    return plan_from_counts(groups, counts, scores)


def query_plan(model: nn.Module, seed: int = 0, steps=(1, 2, 3)) -> PruningPlan:
    """Some of the query heads of every KV group, and of the channels; layer after layer another
    number.
    """
    groups = find_groups(model, attention_unit="query")
    counts = [
        max(1, g.width // g.sections * steps[(i + seed) % len(steps)] // max(steps)) * g.sections
        for i, g in enumerate(groups)
    ]
    return plan_from_counts(groups, counts, random_scores(groups, seed))


@torch.no_grad()
def logits(model: nn.Module, inputs: dict) -> torch.Tensor:
    """Logits of one forward pass without a cache."""
    return model(**inputs, use_cache=False).logits


def dropping_plan(model: nn.Module, *names: str, half: Sequence[str] = ()) -> PruningPlan:
    """The plan that drops the blocks of `names`, and half of the units of `half`."""
    groups = find_groups(model)
    counts = [
        0 if g.name in names else max(1, g.width // 2) if g.name in half else g.width
        for g in groups
    ]
    return plan_from_counts(groups, counts, random_scores(groups))


def removed(groups, counts) -> int:
    """Parameters that a plan takes away."""
    return sum((g.width - k) * g.unit_parameters for g, k in zip(groups, counts, strict=True))


def meets(groups, counts, ratio, bounds) -> bool:
    """At least the ratio goes, and no group could keep one step more."""
    spare = removed(groups, counts) - ratio * total_parameters(groups)
    _, step = bounds.steps(groups)
    climbs = [
        min(s, g.width - k) * g.unit_parameters
        for g, k, s in zip(groups, counts, step, strict=True)
        if k < g.width
    ]
    return spare >= -1e-6 and all(price > spare for price in climbs)


def within(groups, counts, bounds) -> bool:
    """Whether the counts are allowed by bounds that drop nothing."""
    return all(
        k == g.width
        or (
            k >= bounds.min_keep * g.width - 1e-9
            and k * g.columns % bounds.round_to == 0
            and 0 < k < g.width
        )
        for g, k in zip(groups, counts, strict=True)
    )
