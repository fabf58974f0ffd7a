"""Budgets: exact in MACs and parameters, met to the channel, for any sensitivity."""

import copy

import pytest
import stripes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hipp_ext.errors import BudgetError, UnsupportedModelError
from hipp_ext.integrations.torch_pruning import find_channel_groups, prune_channels
from hipp_ext.robust import Bounds, allocate, build_model, channel_costs
from hipp_ext.robust.allocation import MIN_KEEP, global_counts, uniform_counts
from hipp_ext.robust.models import fixed_layers


def counted(model: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """(MACs, parameters) by looking at what the layers do."""
    total, hooks = [0], []
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            hooks.append(
                m.register_forward_hook(
                    lambda m, a, o: total.append(m.weight.numel() * o.shape[2] * o.shape[3])
                )
            )
        elif isinstance(m, nn.Linear):
            hooks.append(
                m.register_forward_hook(
                    lambda m, a, o: total.append(m.weight.numel() * o.numel() // o.shape[-1])
                )
            )
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return sum(total), sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 32), ("vgg16_bn", 32), ("mobilevit_s", 64), ("small-resnet", 16), ("flat", 8)],
)
def test_costs_are_those_of_the_pruned_model(name, size):
    channels = 1 if name in ("small-resnet", "flat") else 3
    model = stripes.network() if name == "flat" else build_model(name, 10, (channels, size, size))
    x = torch.rand(1, channels, size, size)
    groups = find_channel_groups(model, x, ignored=fixed_layers(model))
    costs, widths = channel_costs(model, x, groups), [g.width for g in groups]
    assert tuple(c(widths) for c in costs) == counted(model, x)
    generator = torch.Generator().manual_seed(0)
    keeps = [int(torch.randint(1, n + 1, (1,), generator=generator)) for n in widths]
    kept = {
        g.name: torch.randperm(g.width, generator=generator)[:k].tolist()
        for g, k in zip(groups, keeps, strict=True)
    }
    prune_channels(model, x, kept)
    assert tuple(c(keeps) for c in costs) == counted(model, x)


@pytest.fixture(scope="module")
def costs():
    model, x = build_model("small-resnet", 10, (1, 16, 16)), torch.rand(1, 1, 16, 16)
    groups = find_channel_groups(model, x)
    return [g.width for g in groups], channel_costs(model, x, groups)


@settings(max_examples=40, deadline=None)
@given(
    sensitivity=st.lists(st.floats(0, 1e6), min_size=9, max_size=9),
    share=st.floats(0.03, 1),
    alpha=st.floats(0, 1),
    which=st.integers(0, 1),
)
def test_budgets_are_met_to_the_channel(costs, sensitivity, share, alpha, which):
    widths, cost = costs[0], costs[1][which]
    budget = int(share * cost(widths))
    keeps = allocate(sensitivity, widths, cost, budget, alpha=alpha)
    least, most = Bounds(min_keep=MIN_KEEP).of_widths(widths)
    assert cost(keeps) <= budget and all(
        a <= k <= b for a, k, b in zip(least, keeps, most, strict=True)
    )
    for i, k in enumerate(keeps):
        assert k == most[i] or cost([*keeps[:i], k + 1, *keeps[i + 1 :]]) > budget


def test_the_sensitive_keep_more_and_zero_alpha_is_uniform(costs):
    widths, (macs, _) = costs
    budget = macs(uniform_counts(widths, 0.5))
    assert allocate([0.3] * 9, widths, macs, budget) == uniform_counts(widths, 0.5)
    sensitivity = [1, 1, 1, 1, 16, 1, 1, 1, 1]
    assert allocate(sensitivity, widths, macs, budget, alpha=0.0) == uniform_counts(widths, 0.5)
    keeps = allocate(sensitivity, widths, macs, budget)
    shares = [k / n for k, n in zip(keeps, widths, strict=True)]
    assert shares[4] > 0.7 and max(shares[:4] + shares[5:]) < 0.5
    ranking = [torch.rand(n) + 0.1 for n in widths]
    together = global_counts(ranking, macs, budget)
    assert macs(together) <= budget and macs([k + 1 for k in together]) > budget


def test_one_threshold_for_all_channels():
    model, x = stripes.network(), torch.rand(1, 1, 8, 8)
    groups = find_channel_groups(model, x)
    macs, _ = channel_costs(model, x, groups)
    ranking = [
        torch.tensor([9.0, 9, 9, 1, 1, 1]),
        torch.tensor([9.0] * 6 + [1.0] * 2),
        torch.tensor([9.0] * 2 + [1.0] * 8),
    ]
    assert global_counts(ranking, macs, macs([3, 6, 2]), bounds=Bounds(min_keep=0)) == [3, 6, 2]


def test_budgets_that_cannot_be_met(costs):
    widths, (macs, parameters) = costs
    least, _ = Bounds(min_keep=0.5).of_widths(widths)
    with pytest.raises(
        BudgetError,
        match=r"A budget of 1,000 MACs cannot be met: the least allowed, .* takes [\d,]+. "
        "Lower min_keep",
    ):
        allocate([1.0] * 9, widths, macs, 1000)
    with pytest.raises(BudgetError, match=r"parameters cannot be met"):
        allocate([1.0] * 9, widths, parameters, parameters(least) - 1, bounds=Bounds(min_keep=0.5))
    with pytest.raises(BudgetError, match=r"A budget of 10 MACs cannot be met"):
        global_counts([torch.ones(n) for n in widths], macs, 10)
    with pytest.raises(
        BudgetError, match="One finite sensitivity of at least zero per group is needed, 9 of them"
    ):
        allocate([1.0, float("nan")] + [1.0] * 7, widths, macs, 10**6)
    with pytest.raises(
        BudgetError, match=r"pruning_ratio=1\.0: a number in \[0, 1\) is needed \(fraction removed"
    ):
        uniform_counts(widths, 1.0)


def test_convolutions_that_are_not_counted():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(8 * 16, 3)
    )
    x = torch.rand(1, 4, 8, 8)
    with pytest.raises(UnsupportedModelError, match="1 has 2 groups; only plain and depthwise"):
        channel_costs(model, x, find_channel_groups(copy.deepcopy(model), x))
