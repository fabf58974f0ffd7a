"""The laws of pruning: the mask keeps exactly what the plan says, and a pruned model computes what
the masked one does.
"""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import VARIED, batch, build
from plans import logits, random_plan
from torch import nn

from hipp_ext import PruningPlan, masked, prune
from hipp_ext.errors import PlanError, UnsupportedModelError
from hipp_ext.groups import find_groups
from hipp_ext.plan import PlanGroup
from hipp_ext.units import keep_masks, plan_from_counts, top_units

MODELS = {name: build(name) for name in ("llava", "llava_gqa", "qwen2_5_vl", "llama", "qwen3")}


@st.composite
def model_and_plan(draw):
    """A plan with any non-empty set of units kept in every group."""
    name = draw(st.sampled_from(sorted(MODELS)))
    entries = []
    for g in find_groups(MODELS[name]):
        kept = draw(st.sets(st.integers(0, g.width - 1), min_size=1))
        entries.append(
            PlanGroup(
                tower=g.tower,
                layer=g.layer,
                kind=g.kind,
                width=g.width,
                kept=tuple(sorted(kept)),
                unit_parameters=g.unit_parameters,
            )
        )
    return name, PruningPlan(groups=tuple(entries))


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(model_and_plan(), st.booleans())
def test_pruned_equals_masked_and_has_exactly_the_planned_units(case, left_padded):
    name, plan = case
    model, inputs = MODELS[name], batch(name)
    if left_padded:
        inputs["attention_mask"][0, :1] = 0
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with masked(model, plan):
        expected = logits(model, inputs)
    small = prune(model, plan)
    assert torch.allclose(logits(small, inputs), expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), (
        "the dense model was changed"
    )
    assert {g.name: g.width for g in find_groups(small)} == plan.keep_counts
    removed = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in small.parameters()
    )
    assert removed == sum(e.width * e.unit_parameters for e in plan.groups) - plan.kept_parameters


@settings(max_examples=40, deadline=None)
@given(model_and_plan())
def test_masks_keep_exactly_what_the_plan_says(case):
    for entry, mask in zip(case[1].groups, keep_masks(case[1]).values(), strict=True):
        assert mask.nonzero().flatten().tolist() == list(entry.kept)


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.data())
def test_the_highest_scores_stay(scores, data):
    keep = data.draw(st.integers(1, len(scores)))
    kept = top_units(torch.tensor(scores), keep)
    removed = set(range(len(scores))) - set(kept)
    assert len(kept) == keep and all(
        torch.tensor(scores)[i] <= min(torch.tensor(scores)[list(kept)]) for i in removed
    )


@pytest.mark.parametrize(
    ("name", "implementation"),
    [*((name, "sdpa") for name in VARIED), ("llava_gqa", "eager"), ("qwen2_5_vl", "eager")],
)
def test_the_small_model_generates_what_the_masked_one_does(name, implementation):
    model, inputs = build(name), batch(name)
    model.set_attn_implementation(implementation)
    plan = random_plan(model)
    small = prune(model, plan)
    options = [{}, {"num_beams": 2}, {"cache_implementation": "static"}]
    for option in options:
        arguments = dict(**inputs, max_new_tokens=6, do_sample=False, **option)
        with masked(model, plan):
            expected = model.generate(**arguments)
        assert torch.equal(small.generate(**arguments), expected), option


@pytest.mark.parametrize("name", ["llava_gqa", "qwen2_5_vl"])
def test_the_small_model_trains(name):
    model, inputs = build(name), batch(name, labels=True)
    small = prune(model, random_plan(model)).train()
    small(**inputs).loss.backward()
    for g in find_groups(small):
        assert small.get_submodule(g.consumer).weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["llava", "llava_next", "smolvlm"])
def test_the_vision_tower_can_be_pruned_too(name):
    model, inputs = build(name), batch(name)
    plan = random_plan(model, towers=("language", "vision"))
    with masked(model, plan):
        expected = logits(model, inputs)
    assert torch.allclose(logits(prune(model, plan), inputs), expected, atol=1e-5)


def test_in_place_and_copy_agree_and_gradients_come_along():
    model, inputs = build("llava"), batch("llava", labels=True)
    plan = random_plan(model)
    model(**inputs).loss.backward()
    weight = find_groups(model)[1].consumer + ".weight"
    gradient = model.get_parameter(weight).grad
    kept = list(plan.groups[1].kept)
    copied = prune(model, plan)
    assert prune(model, plan, inplace=True) is model
    assert torch.equal(logits(model, inputs), logits(copied, inputs))
    assert torch.equal(model.get_parameter(weight).grad, gradient[:, kept])
    assert model.hipp_plan == plan


def test_a_copy_shares_no_weights_with_the_dense_model():
    model = build("llama")
    small = prune(model, random_plan(model))
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in pointers for p in small.parameters())


def test_pruning_twice_composes():
    model, inputs = build("llava"), batch("llava")
    small = prune(model, random_plan(model, 0.2))
    smaller = prune(small, random_plan(small, 0.3))
    with masked(small, random_plan(small, 0.3)):
        expected = logits(small, inputs)
    assert torch.allclose(logits(smaller, inputs), expected, atol=1e-5)


def test_bfloat16_weights_stay_bfloat16():
    model = build("llava").to(torch.bfloat16)
    small = prune(model, random_plan(model))
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}


def test_masked_leaves_no_hooks_even_after_an_error():
    model, inputs = build("llava"), batch("llava")
    before = logits(model, inputs)
    with pytest.raises(RuntimeError, match="on purpose"), masked(model, random_plan(model)):
        raise RuntimeError("on purpose")
    assert torch.equal(logits(model, inputs), before)


def same_state(model, before):
    return all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("llava_gqa", r"language\.0\.attention: plan 2 units"),
        ("llama", "plan 3 units of"),
        ("qwen2_5_vl", "plan 2 units"),
    ],
)
def test_a_plan_of_another_model_changes_nothing(other, message):
    model = build("llava")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=message):
        prune(model, random_plan(build(other)), inplace=True)
    with (
        pytest.raises(PlanError, match="another model than this Llava"),
        masked(model, random_plan(build(other))),
    ):
        pass
    assert same_state(model, before) and not hasattr(model, "hipp_plan")


def test_a_plan_that_leaves_groups_out_is_refused():
    model = build("llava")
    plan = random_plan(model)
    with pytest.raises(PlanError, match=r"only in the model: \['language.2.ffn'\]"):
        prune(model, plan.replace(groups=plan.groups[:-1]))
    from models import llava

    with pytest.raises(
        PlanError, match=r"only in the plan: \['language.2.attention', 'language.2.ffn'\]"
    ):
        prune(llava(layers=2), plan)


class Wrapped(nn.Linear):
    pass


def test_what_cannot_be_sliced_changes_nothing():
    model = build("llava")
    plan = random_plan(model)
    last = model.model.language_model.layers[2].mlp
    last.down_proj.__class__ = Wrapped
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.2\.mlp\.down_proj is a Wrapped.*Nothing was changed"
    ):
        prune(model, plan, inplace=True)
    assert same_state(model, before)


def test_shared_weights_are_refused():
    model = build("llava")
    layers = model.model.language_model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(UnsupportedModelError, match="shares its weight"):
        prune(model, random_plan(model))


def test_a_plan_may_be_given_by_its_path(tmp_path):
    model, inputs = MODELS["llama"], batch("llama")
    plan = random_plan(model)
    plan.save(tmp_path / "plan.json")
    for path in (tmp_path / "plan.json", str(tmp_path / "plan.json")):
        small = prune(model, path)
        assert small.hipp_plan == plan and torch.equal(
            logits(small, inputs), logits(prune(model, plan), inputs)
        )
        with masked(model, path):
            assert torch.allclose(logits(model, inputs), logits(small, inputs), atol=1e-5)
    with pytest.raises(PlanError, match="There is no plan at nowhere.json"):
        prune(model, "nowhere.json")
    with pytest.raises(PlanError, match="the path of a plan file, is needed, not a dict"):
        prune(model, {})


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_inside_a_wrapper_is_pruned_alike(inplace):
    peft = pytest.importorskip("peft")
    model, inputs = build("llava"), batch("llava")
    layers = ["multi_modal_projector.linear_1", "multi_modal_projector.linear_2"]
    adapted = peft.get_peft_model(build("llava"), peft.LoraConfig(r=2, target_modules=layers))
    groups = find_groups(model)
    scores = {g.name: torch.arange(float(g.width)) for g in groups}
    plan = plan_from_counts(groups, [g.width // 2 for g in groups], scores)
    small = prune(adapted, plan, inplace=inplace)
    assert torch.allclose(logits(small, inputs), logits(prune(model, plan), inputs), atol=1e-5)
