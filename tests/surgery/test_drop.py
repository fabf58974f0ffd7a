"""Blocks and layers that leave whole: pruned == masked == sliced, saved, loaded, padded,
generated.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import PECULIAR, VARIED, VOCAB, batch, build
from plans import dropping_plan, logits, random_scores
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import FAMILIES as FAMILIES_OF_ZOO

from hipp_ext import load_pruned, masked, pad_to_uniform, prune, save_pruned
from hipp_ext.errors import PlanError
from hipp_ext.groups import find_groups, find_skips, tower_layers
from hipp_ext.kinds import Skip
from hipp_ext.plan import PruningPlan
from hipp_ext.surgery.masks import zero_units
from hipp_ext.surgery.slices import sliced
from hipp_ext.units import plan_from_counts

FAMILIES = [*VARIED, *PECULIAR]


def close(one, other):
    return torch.allclose(one, other, atol=2e-4 * float(other.abs().max()))


@st.composite
def keep_counts(draw, groups):
    """Counts of which some are zero, but not all."""
    counts = [draw(st.sampled_from([0, 0, max(1, g.width // 2), g.width])) for g in groups]
    if not any(counts):
        counts[draw(st.integers(0, len(groups) - 1))] = 1
    return counts


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_pruned_is_masked_is_sliced_is_zeroed(family, data):
    model, inputs = build(family), batch(family)
    groups = find_groups(model)
    scores = random_scores(groups)
    counts = data.draw(keep_counts(groups))
    plan = plan_from_counts(groups, counts, scores)
    assert PruningPlan.from_json(plan.to_json()) == plan
    dense = logits(model, inputs)
    small = prune(model, plan)
    with masked(model, plan):
        expected = logits(model, inputs)
    assert close(logits(small, inputs), expected)
    with sliced(model, groups, scores) as shrink:
        shrink(counts)
        assert close(logits(model, inputs), expected)
        shrink([g.width for g in groups])
        assert close(logits(model, inputs), dense)
    assert torch.equal(logits(model, inputs), dense)
    zero_units(model, plan)
    assert close(logits(model, inputs), expected)
    left = sum(p.numel() for p in small.parameters())
    assert left <= sum(p.numel() for p in build(family).parameters()) - sum(
        (g.width - k) * g.unit_parameters for g, k in zip(groups, counts, strict=True)
    )


@pytest.mark.parametrize("blocks", [("attention",), ("attention", "ffn")], ids="+".join)
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gpt_neo"])
def test_tokens_are_counted_where_the_first_attention_is_dropped(name, blocks):
    """The cache counts them there, under whichever name the block is given it; without the whole
    layer, in the next one.
    """
    family = FAMILIES_OF_ZOO[name]
    model, inputs = family.build(), family.batch()
    plan = dropping_plan(model, *(f"language.0.{block}" for block in blocks))
    tokens = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with masked(model, plan):
        expected = model.generate(**inputs, **tokens)
    small = prune(model, plan)
    assert torch.equal(small.generate(**inputs, **tokens), expected)
    assert torch.equal(small.generate(**inputs, **tokens, use_cache=False), expected)


def dropped(family, *names, half=()):
    """A model, and it pruned: blocks of `names` dropped, those of `half` cut to half."""
    model = build(family)
    return model, prune(model, dropping_plan(model, *names, half=half))


BLOCKS = ("language.0.attention", "language.1.ffn")
LAYER = ("language.1.attention", "language.1.ffn")


@pytest.mark.parametrize(
    ("family", "names"), [*((f, BLOCKS) for f in FAMILIES), ("llava_gqa", LAYER), ("mllama", LAYER)]
)
def test_a_dropped_block_is_saved_loaded_and_padded(family, names, tmp_path):
    model, small = dropped(family, *names, half=("language.0.ffn",))
    inputs = batch(family)
    with pytest.warns(UserWarning, match="no processor"):
        save_pruned(small, tmp_path / "small")
    loaded = load_pruned(tmp_path / "small")
    assert torch.equal(logits(loaded, inputs), logits(small, inputs))
    assert loaded.hipp_plan == small.hipp_plan
    assert find_skips(loaded) == find_skips(small)
    padded = pad_to_uniform(small)
    assert close(logits(padded, inputs), logits(small, inputs)) and not find_skips(padded)
    padded.save_pretrained(tmp_path / "padded")
    stock = type(model).from_pretrained(tmp_path / "padded")
    assert close(logits(stock.eval(), inputs), logits(small, inputs))


@pytest.mark.parametrize(
    ("family", "cache"),
    [*((f, "dynamic") for f in VARIED), *((f, "static") for f in ("qwen2_5_vl", "qwen3"))],
)
def test_generation_counts_its_tokens_without_the_first_attention(family, cache):
    model, small = dropped(family, "language.0.attention", "language.2.ffn")
    inputs = batch(family, size=2)
    options = dict(max_new_tokens=4, do_sample=False, cache_implementation=cache)
    options |= dict(pad_token_id=0, eos_token_id=VOCAB + 1, return_dict_in_generate=True)
    made = small.generate(**inputs, **options, output_logits=True)
    with masked(model, small.hipp_plan):
        expected = model.generate(**inputs, **options, output_logits=True)
    assert torch.equal(made.sequences, expected.sequences)
    assert close(torch.stack(made.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("family", VARIED)
def test_stock_transformers_loads_a_model_without_some_layers(family, tmp_path):
    model, small = dropped(family, *LAYER)
    inputs = batch(family)
    layers = len(tower_layers(model, "language"))
    assert len(tower_layers(small, "language")) == layers - 1
    assert small.config.get_text_config().num_hidden_layers == layers - 1
    assert not getattr(small.config.get_text_config(), "is_heterogeneous", False)
    small.save_pretrained(tmp_path)
    stock = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(stock, inputs), logits(small, inputs))
    assert torch.equal(logits(load_pruned(tmp_path), inputs), logits(small, inputs))


def test_a_dropped_block_is_a_skip_without_parameters_and_says_so_in_the_configuration():
    _, small = dropped("llama", *BLOCKS)
    first, second, _ = tower_layers(small, "language")
    assert isinstance(first.self_attn, Skip) and isinstance(first.input_layernorm, nn.Identity)
    assert isinstance(second.mlp, Skip) and not list(second.mlp.parameters())
    config = small.config.to_dict()["per_layer_config"]
    skips = {int(i): values.get("skip") for i, values in config.items()}
    assert skips[0] == ["attention"] and skips[1] == ["mlp"] and not skips.get(2)


@pytest.mark.parametrize("block", ["attention", "ffn"])
def test_a_dropped_block_computes_nothing(block):
    model, small = dropped("llama", f"language.1.{block}")
    for each in (model, small):
        each.set_attn_implementation("eager")  # whose products are counted
    inputs = batch("llama")
    group = next(g for g in find_groups(model) if g.name == f"language.1.{block}")
    tokens = inputs["input_ids"].numel()
    linear = tokens * group.width * group.unit_flops
    saved = flops(model, inputs) - flops(small, inputs)
    context = tokens * group.width * group.context_flops(inputs["input_ids"].shape[1])
    assert saved == linear + context


def flops(model, inputs):
    with FlopCounterMode(display=False) as counter:
        logits(model, inputs)
    return counter.get_total_flops()


def test_gates_and_numbered_features_keep_their_layer():
    _, small = dropped("mllama", *LAYER)  # layer 1 reads the image through gates
    assert len(tower_layers(small, "language")) == 3
    assert find_skips(small) == [(1, "attention"), (1, "ffn")]


def test_layers_of_another_kind_keep_their_numbers_right():
    model = build("gemma3")
    model.config.get_text_config().layer_types = ["sliding_attention", "full_attention"]
    groups = find_groups(model)
    counts = [0 if g.layer == 0 else g.width for g in groups]
    small = prune(model, plan_from_counts(groups, counts, random_scores(groups)))
    assert small.config.get_text_config().layer_types == ["full_attention"]
    assert all(
        m.layer_idx == 0
        for m in tower_layers(small, "language")[0].modules()
        if hasattr(m, "layer_idx")
    )


def test_a_pruned_model_is_pruned_again():
    _, small = dropped("llava", *BLOCKS, half=("language.2.ffn",))
    groups, inputs = find_groups(small), batch("llava")
    assert len(groups) == 4
    counts = [0 if g.name == "language.1.attention" else g.width for g in groups]
    plan = plan_from_counts(groups, counts, random_scores(groups))
    smaller = prune(small, plan)
    assert len(tower_layers(smaller, "language")) == 2
    with masked(small, plan):
        assert close(logits(smaller, inputs), logits(small, inputs))
    in_place = prune(small, plan, inplace=True)
    assert in_place is small and torch.equal(logits(small, inputs), logits(smaller, inputs))


def test_a_tower_keeps_something():
    groups = find_groups(build("llama"))
    with pytest.raises(PlanError, match="must keep a unit of the language tower"):
        plan_from_counts(groups, [0] * len(groups), random_scores(groups))


@pytest.mark.parametrize("family", ["llava", "smolvlm"])
def test_blocks_of_the_vision_tower(family, tmp_path):
    model, inputs = build(family), batch(family)
    groups = find_groups(model, ("vision",))
    counts = [0 if g.layer == 0 else g.width for g in groups]
    plan = plan_from_counts(groups, counts, random_scores(groups))
    small = prune(model, plan)
    with masked(model, plan):
        assert close(logits(small, inputs), logits(model, inputs))
    with pytest.warns(UserWarning, match="no processor"):
        save_pruned(small, tmp_path / "small")
    assert torch.equal(logits(load_pruned(tmp_path / "small"), inputs), logits(small, inputs))
