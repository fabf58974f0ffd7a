"""Groups partition what can be pruned, whatever the model; what cannot be mapped raises."""

import pytest
import torch
from models import BUILDERS, build
from torch import nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.groups import decoder, find_groups, tower_layers


@pytest.mark.parametrize("name", BUILDERS)
def test_groups_partition_the_projections_of_the_language_tower(name):
    model = build(name)
    groups = find_groups(model)
    assert [g.name for g in groups] == [
        f"language.{i}.{k}" for i in range(3) for k in ("attention", "ffn")
    ]
    mapped = [n for g in groups for n in (*g.producers, g.consumer)]
    linear = {
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and m in set(decoder(model).modules())
    }
    assert len(mapped) == len(set(mapped)) and set(mapped) == linear
    for g in groups:
        for part in g.produced:
            assert model.get_submodule(part.layer).out_features == g.width * part.size
        assert model.get_submodule(g.consumer).in_features == g.width * g.columns
        parameters = sum(model.get_submodule(n).weight.numel() for n in (*g.producers, g.consumer))
        assert g.unit_flops * g.width == 2 * parameters
        biases = [model.get_submodule(n).bias for n in g.producers]
        assert g.parameters == parameters + sum(b.numel() for b in biases if b is not None)


def test_a_unit_of_grouped_query_attention_is_a_whole_kv_group():
    attention = find_groups(build("llava_gqa"))[0]
    assert attention.width == 2 and attention.columns == 4 * 6
    assert [part.size for part in attention.produced] == [4 * 6, 6, 6]


@pytest.mark.parametrize("name", ["llava", "llava_next", "smolvlm"])
def test_the_vision_tower_is_off_by_default_and_can_be_asked_for(name):
    model = build(name)
    assert {g.tower for g in find_groups(model)} == {"language"}
    vision = find_groups(model, ("vision",))
    assert len(vision) == 4 and vision[0].width == 3 and vision[1].width == 52


def test_context_flops_count_scores_and_weighted_sum():
    attention, ffn = find_groups(build("llava"))[:2]
    assert attention.context_flops(100) == 2 * 2 * 10 * 100 and ffn.context_flops(100) == 0


def test_a_norm_over_all_heads_is_refused_by_name():
    model = build("llama")
    tower_layers(model, "language")[1].self_attn.q_norm = nn.LayerNorm(48)
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.1\.self_attn\.q_norm\.weight has shape \(48,\)"
    ):
        find_groups(model)


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="Linear is not a transformers model"):
        find_groups(nn.Linear(2, 3))
    with pytest.raises(UnsupportedModelError, match="has no vision tower"):
        find_groups(build("llama"), ("vision",))


def test_a_layer_without_attention_is_not_skipped():
    model = build("llama")
    layers = tower_layers(model, "language")
    layers[2].self_attn = nn.Identity()
    with pytest.raises(
        UnsupportedModelError, match=r"model\.layers\.2 .*it has 0 attention blocks"
    ):
        find_groups(model)
    assert torch.is_tensor(model.lm_head.weight)
