"""Slices of a sorted model compute what the pruned model computes, and leave no trace."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import VARIED, batch, build
from plans import random_scores

from hipp_ext import prune
from hipp_ext.errors import PlanError, UnsupportedModelError
from hipp_ext.groups import find_groups
from hipp_ext.surgery.slices import sliced
from hipp_ext.units import plan_from_counts

MODELS = {name: build(name) for name in ("llava", "llava_gqa", "qwen2_5_vl", "llama", "qwen3")}


@torch.no_grad()
def logits(model, name):
    return model(**batch(name), use_cache=False).logits


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(MODELS)), st.data())
def test_sliced_equals_pruned_plan_after_plan(name, data):
    model = MODELS[name]
    groups, scores = find_groups(model), random_scores(find_groups(model))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    identities = {k: id(v) for k, v in model.named_parameters()}
    seen = []
    with sliced(model, groups, scores) as shrink:
        for _ in range(2):
            counts = [data.draw(st.integers(1, g.width)) for g in groups]
            shrink(counts)
            got = logits(model, name)
            assert [g.width for g in find_groups(model)] == counts
            plan = plan_from_counts(groups, counts, scores)
            seen.append((plan, got))
    assert {k: id(v) for k, v in model.named_parameters()} == identities
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert find_groups(model) == groups
    for plan, got in seen:
        assert torch.allclose(logits(prune(model, plan), name), got, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", VARIED)
def test_generation_too(name):
    model = build(name)
    groups, scores = find_groups(model), random_scores(find_groups(model), 1)
    counts = [max(1, g.width // 2) for g in groups]
    inputs = batch(name)
    small = prune(model, plan_from_counts(groups, counts, scores))
    with sliced(model, groups, scores) as shrink:
        shrink(counts)
        got = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(got, small.generate(**inputs, max_new_tokens=5, do_sample=False))


def test_no_weight_is_copied_per_plan():
    model = MODELS["llava"]
    groups = find_groups(model)
    weight = model.model.language_model.layers[0].mlp.down_proj.weight
    with sliced(model, groups, random_scores(find_groups(model))) as shrink:
        storage = weight.untyped_storage().data_ptr()
        for counts in ([1] * len(groups), [g.width for g in groups]):
            shrink(counts)
            assert weight.untyped_storage().data_ptr() == storage
        assert weight.shape[1] == groups[1].width


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whatever_happens_inside_the_model_comes_back(error):
    model = MODELS["llava_gqa"]
    groups = find_groups(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error), sliced(model, groups, random_scores(find_groups(model))) as shrink:
        shrink([1] * len(groups))
        raise error
    assert (
        all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        and find_groups(model) == groups
    )


def test_bad_counts_and_layers_are_refused():
    model = build("llama")
    groups, scores = find_groups(model), random_scores(find_groups(model))
    with sliced(model, groups, scores) as shrink:
        for counts in ([1] * (len(groups) - 1), [-1] * len(groups), [g.width + 1 for g in groups]):
            with pytest.raises(PlanError, match="do not fit groups of"):
                shrink(counts)
    with pytest.raises(PlanError, match="No scores for"), sliced(model, groups, {}):
        pass
    layer = model.model.layers[0].mlp
    layer.up_proj.weight = layer.gate_proj.weight
    with (
        pytest.raises(UnsupportedModelError, match="shares its weight"),
        sliced(model, groups, scores),
    ):
        pass
