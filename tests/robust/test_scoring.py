"""Ranking channels: what `auto` chooses, and what is refused."""

import pytest
import torch
from torch import nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.integrations.torch_pruning import find_channel_groups
from hipp_ext.robust import build_model
from hipp_ext.robust.scoring import rank_channels


def test_channels_are_ranked_by_batch_norm_where_there_is_one():
    example = torch.rand(1, 1, 16, 16)
    batches = [(torch.rand(4, 1, 16, 16), torch.arange(4))]
    normed = build_model("small-resnet", 10, (1, 16, 16)).eval()
    for p in normed.parameters():
        nn.init.normal_(p)
    groups = find_channel_groups(normed, example)
    auto, bn = (rank_channels(normed, groups, batches, kind) for kind in ("auto", "bn"))
    assert all(torch.equal(a, b) for a, b in zip(auto, bn, strict=True))
    first = next(i for i, g in enumerate(groups) if g.name == "blocks.0.conv1")
    assert torch.equal(
        bn[first], normed.get_parameter("blocks.0.bn1.weight").detach().abs().double()
    )

    plain = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10)
    ).eval()
    groups = find_channel_groups(plain, example, ignored=[plain[4]])
    auto, taylor = (rank_channels(plain, groups, batches, kind) for kind in ("auto", "taylor"))
    assert all(torch.equal(a, b) for a, b in zip(auto, taylor, strict=True))
    with pytest.raises(
        UnsupportedModelError,
        match="No batch norm follows the channels of 0; rank them by l1 or taylor",
    ):
        rank_channels(plain, groups, batches, "bn")
