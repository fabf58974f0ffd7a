"""Query heads in every way of pruning: the same number leaves every KV group, and all agree."""

import copy
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import batch, build
from plans import logits, query_plan, random_scores

from hipp_ext import PruningPlan, load_pruned, masked, pad_to_uniform, prune, save_pruned
from hipp_ext.errors import PlanError
from hipp_ext.groups import find_groups, find_skips
from hipp_ext.plan import PlanGroup
from hipp_ext.surgery.masks import zero_units
from hipp_ext.surgery.slices import sliced
from hipp_ext.units import plan_from_counts

pytestmark = pytest.mark.filterwarnings("ignore:.*no processor")
NAMES = ("llama", "llava_gqa", "llava_mqa", "qwen2_5_vl", "qwen3")
MODELS = {name: build(name) for name in NAMES}
GROUPS = {name: find_groups(model, attention_unit="query") for name, model in MODELS.items()}


@st.composite
def model_and_plan(draw):
    """Any units of every section, the same number; some attention blocks are dropped."""
    name = draw(st.sampled_from(NAMES))
    entries = []
    for g in GROUPS[name]:
        size = g.width // g.sections
        keep = draw(st.integers(0 if g.sections > 1 and g.layer else 1, size))
        kept = [
            section * size + unit
            for section in range(g.sections)
            for unit in sorted(draw(st.permutations(range(size)))[:keep])
        ]
        entries.append(
            PlanGroup(
                tower=g.tower,
                layer=g.layer,
                kind=g.kind,
                width=g.width,
                kept=tuple(kept),
                unit_parameters=g.unit_parameters,
                sections=g.sections,
            )
        )
    return name, PruningPlan(groups=tuple(entries))


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(model_and_plan(), st.booleans())
def test_pruned_is_masked_is_zeroed(case, left_padded):
    name, plan = case
    model, inputs = MODELS[name], batch(name)
    if left_padded:
        inputs["attention_mask"][0, :1] = 0
    with masked(model, plan):
        expected = logits(model, inputs)
    small, zeroed = prune(model, plan), copy.deepcopy(model)
    zero_units(zeroed, plan)
    for other in (small, zeroed):
        assert torch.allclose(logits(other, inputs), expected, atol=1e-5, rtol=1e-5)
    dropped = [e for e in plan.groups if not e.keep]
    assert len(find_skips(small)) == len(dropped)
    removed = 0
    for g, e in zip(GROUPS[name], plan.groups, strict=True):
        removed += (e.width - e.keep) * e.unit_parameters
        if g.place == "ffn":
            continue
        block = model.get_submodule(g.block)
        if not e.keep:
            rest = [block.k_proj, block.v_proj]
            removed += sum(p.numel() for layer in rest for p in layer.parameters())
            norms = [getattr(block, n, None) for n in ("q_norm", "k_norm")]
            removed += sum(p.numel() for n in norms if n is not None for p in n.parameters())
            layer = model.get_submodule(g.block.rpartition(".")[0])
            removed += layer.input_layernorm.weight.numel()
            continue
        own = small.get_submodule(g.block)
        assert own.num_key_value_groups * g.sections == e.keep
        assert own.k_proj.weight.shape == block.k_proj.weight.shape
        assert getattr(own, "num_heads", e.keep) == e.keep
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    assert sizes[0] - sizes[1] == removed


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(NAMES), st.data())
def test_sliced_is_pruned_plan_after_plan_and_leaves_no_trace(name, data):
    model, groups = MODELS[name], GROUPS[name]
    scores = random_scores(groups)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = []
    with sliced(model, groups, scores) as shrink:
        for _ in range(2):
            counts = [g.sections * data.draw(st.integers(0, g.width // g.sections)) for g in groups]
            counts[-1] = counts[-1] or 1
            shrink(counts)
            got = logits(model, batch(name))
            plan = plan_from_counts(groups, counts, scores)
            seen.append((plan, got))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert find_groups(model, attention_unit="query") == groups
    for plan, got in seen:
        expected = logits(prune(model, plan), batch(name))
        assert torch.allclose(expected, got, atol=1e-5, rtol=1e-5)


def test_slices_refuse_counts_that_sections_cannot_share():
    groups = GROUPS["llama"]
    with (
        sliced(MODELS["llama"], groups, random_scores(groups)) as shrink,
        pytest.raises(PlanError, match=r"do not fit groups of \[3 x 2, 44, 3 x 2"),
    ):
        shrink([4, 44] * 3)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_the_small_model_generates_what_the_masked_one_does(name, implementation):
    model, inputs = build(name), batch(name)
    model.set_attn_implementation(implementation)
    plan = query_plan(model)
    small = prune(model, plan)
    for option in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        arguments = dict(**inputs, max_new_tokens=6, do_sample=False, **option)
        with masked(model, plan):
            expected = model.generate(**arguments)
        assert torch.equal(small.generate(**arguments), expected), option


@pytest.mark.parametrize("name", [*NAMES, "smolvlm", "mistral", "gemma3", "mllama"])
def test_saved_is_loaded_to_the_bit(name, tmp_path):
    model, inputs = build(name), batch(name)
    groups = find_groups(model, attention_unit="query")
    # Every KV group is left with one query head, and a block is dropped.
    counts = [g.sections if g.place == "attention" else g.width for g in groups]
    dropping = plan_from_counts(groups, [*counts[:2], 0, *counts[3:]], random_scores(groups))
    for number, plan in enumerate((query_plan(model), dropping)):
        small = prune(model, plan)
        folder = save_pruned(small, tmp_path / str(number))
        loaded = load_pruned(folder)
        assert torch.equal(logits(loaded, inputs), logits(small, inputs))
        assert loaded.hipp_plan == plan
        for unit in ("kv", "query"):
            found = [find_groups(m, attention_unit=unit) for m in (loaded, small)]
            assert found[0] == found[1]


@pytest.mark.parametrize("name", NAMES)
def test_kv_groups_and_query_heads_one_after_the_other(name, tmp_path):
    model, inputs = build(name), batch(name)
    kv = find_groups(model)
    counts = [max(1, g.width - (g.layer + 1) % 2) if g.place == "attention" else 31 for g in kv]
    first = prune(model, plan_from_counts(kv, counts, random_scores(kv)))
    second = query_plan(first, 1)
    with masked(first, second):
        expected = logits(first, inputs)
    small = prune(first, second)
    assert torch.allclose(logits(small, inputs), expected, atol=1e-5)
    loaded = load_pruned(save_pruned(small, tmp_path / "both"))
    assert torch.equal(logits(loaded, inputs), logits(small, inputs))
    # And whole KV groups of what is left.
    left = find_groups(loaded)
    counts = [max(1, g.width - 1) if g.place == "attention" else g.width // 2 for g in left]
    plan = plan_from_counts(left, counts, random_scores(left))
    with masked(loaded, plan):
        expected = logits(loaded, inputs)
    last = prune(loaded, plan)
    assert torch.allclose(logits(last, inputs), expected, atol=1e-5)
    padded = pad_to_uniform(last)
    assert torch.allclose(logits(padded, inputs), logits(last, inputs), atol=1e-5)
    padded.save_pretrained(tmp_path / "padded")
    stock = type(model).from_pretrained(tmp_path / "padded").eval()
    assert torch.allclose(logits(stock, inputs), logits(last, inputs), atol=1e-5)


@pytest.mark.parametrize(
    "name, repeat", [("llava_gqa", 2), ("llava_mqa", 2), ("qwen3", 1), ("qwen2_5_vl", 2)]
)
def test_padding_ends_at_the_most_query_heads_of_any_layer(name, repeat, tmp_path):
    """Where the configuration can say so: Qwen2.5-VL has no head_dim, and gets its heads back."""
    model, inputs = build(name), batch(name)
    groups = find_groups(model, attention_unit="query")
    counts = [
        30 if g.place == "ffn" else g.sections * (1 + (repeat > 1) * (g.layer % 2)) for g in groups
    ]
    small = prune(model, plan_from_counts(groups, counts, random_scores(groups)))
    padded = pad_to_uniform(small)
    padded.save_pretrained(tmp_path / "padded")
    stock = type(model).from_pretrained(tmp_path / "padded").eval()
    assert torch.allclose(logits(stock, inputs), logits(small, inputs), atol=1e-5)
    text, dense = stock.config.get_text_config(), model.config.get_text_config()
    expected = dense.num_attention_heads if name == "qwen2_5_vl" else repeat * groups[0].sections
    assert text.num_attention_heads == expected
    assert text.num_key_value_heads == dense.num_key_value_heads


def test_equal_layers_load_with_stock_transformers(tmp_path):
    model, inputs = build("llava_gqa"), batch("llava_gqa")
    groups = find_groups(model, attention_unit="query")
    counts = [4 if g.place == "attention" else 32 for g in groups]
    small = prune(model, plan_from_counts(groups, counts, random_scores(groups)))
    assert small.config.text_config.num_attention_heads == 4
    folder = save_pruned(small, tmp_path / "equal")
    stock = type(model).from_pretrained(folder).eval()
    assert torch.equal(logits(stock, inputs), logits(small, inputs))


def test_the_config_has_the_query_heads_of_every_layer(tmp_path):
    model = build("llama")
    small = prune(model, query_plan(model))
    heads = [e.keep for e in small.hipp_plan.groups if e.kind == "query_heads"]
    layers = small.config.per_layer_config
    assert [layers[i].num_attention_heads for i in range(3)] == heads
    assert [layers[i].num_key_value_heads for i in range(3)] == [3, 3, 3]
    # hipp_ext.json names query heads where the configuration of the tower says otherwise.
    manifest = json.loads((save_pruned(small, tmp_path / "small") / "hipp_ext.json").read_text())
    named = {g["layer"]: g["width"] for g in manifest["groups"] if g["kind"] == "query_heads"}
    assert named == {i: k for i, k in enumerate(heads) if k != 6}


@pytest.mark.parametrize("name", ["llama", "llava_gqa"])
def test_reconstruction_makes_up_for_heads_too(name):
    model, inputs = build(name), batch(name, size=12, length=19)
    plan = query_plan(model)
    dense = logits(model, inputs)
    errors = [
        float((logits(prune(model, plan, **options), inputs) - dense).norm())
        for options in ({}, {"reconstruct": True, "calibration": [inputs]})
    ]
    assert errors[1] < 0.8 * errors[0]


def test_in_place_gradients_and_training():
    model, inputs = build("qwen2_5_vl"), batch("qwen2_5_vl", labels=True)
    plan = query_plan(model)
    copied = prune(model, plan)
    assert prune(model, plan, inplace=True) is model
    assert torch.equal(logits(model, inputs), logits(copied, inputs))
    model.train()(**inputs).loss.backward()
    for g in find_groups(model, attention_unit="query"):
        for part in g.owns:
            gradient = model.get_parameter(part.parameter).grad
            assert gradient.shape[part.dim] == g.width * part.size and gradient.abs().sum() > 0
