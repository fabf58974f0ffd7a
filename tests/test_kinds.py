"""A kind of its own needs one class and a line in KINDS: here the shared expert of Qwen2-MoE, in
place of the routed ones.
"""

from dataclasses import replace

import pytest
import torch
from models import batch
from test_families import text_model
from torch import nn

from hipp_ext import masked, prune
from hipp_ext.errors import UnsupportedModelError
from hipp_ext.families import BLOCKS
from hipp_ext.groups import find_groups, find_skips, left_whole
from hipp_ext.kinds import FFN, KINDS, Skip
from hipp_ext.planner.state import FEATURES, measure_signals
from hipp_ext.scorers import VisualSensitivity
from hipp_ext.units import plan_from_counts

EXPERTS = {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 28,
    "shared_expert_intermediate_size": 36,
    "mlp_only_layers": [1],
}


class SharedExpert(FFN):
    """The FFN of a mixture of experts that every token passes; it stands beside the others."""

    name = "shared_expert"
    names = replace(BLOCKS["ffn"], skip="shared_expert")
    fields = ("shared_expert_intermediate_size",)

    def find(self, layer: nn.Module) -> list[nn.Module]:
        blocks = [getattr(child, "shared_expert", None) for child in layer.children()]
        return [b for b in blocks if isinstance(b, Skip) or (b is not None and self.match(b))]


@pytest.fixture
def model(monkeypatch):
    monkeypatch.delitem(KINDS, "experts")
    monkeypatch.setitem(KINDS, "shared_expert", SharedExpert())
    return text_model("Qwen2Moe", **EXPERTS)


@torch.no_grad()
def test_another_kind_is_scored_and_pruned_as_masked(model):
    groups, inputs = find_groups(model, partial="report"), batch("llama")
    assert {part.module for part in left_whole(model)} == {
        "model.layers.0.mlp.gate",
        "model.layers.0.mlp.experts",
        "model.layers.0.mlp.shared_expert_gate",
    }
    assert [(g.name, g.width) for g in groups] == [
        ("language.0.attention", 2),
        ("language.0.shared_expert", 36),
        ("language.1.attention", 2),
        ("language.1.ffn", 40),
    ]
    signals = measure_signals(model, [inputs], groups=groups)
    assert signals.state.shape == (4, FEATURES) and torch.isfinite(signals.state).all()
    for counts in ([2, 9, 1, 40], [2, 0, 2, 10]):
        plan = plan_from_counts(groups, counts, signals.scores)
        with masked(model, plan):
            expected = model(**inputs).logits
        small = prune(model, plan)
        assert torch.allclose(small(**inputs).logits, expected, atol=1e-5)
        assert find_skips(small) == ([] if counts[1] else [(0, "shared_expert")])
        assert small.model.layers[0].mlp.gate.weight.shape[0] == 3


def test_without_it_the_layer_has_no_block_in_one_place(monkeypatch):
    monkeypatch.delitem(KINDS, "experts")
    with pytest.raises(
        UnsupportedModelError, match=r"layers.0.mlp \(Qwen2MoeSparseMoeBlock\): no block of"
    ):
        find_groups(text_model("Qwen2Moe", **EXPERTS))


def test_a_scorer_of_some_kinds_refuses_the_others(model):
    with pytest.raises(
        UnsupportedModelError, match=r"attention, query_heads, .* only.*0\.shared_expert"
    ):
        VisualSensitivity()(model, [batch("llama")], groups=find_groups(model, partial="report"))
