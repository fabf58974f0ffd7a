"""One plan, one result: hipp_ext.prune, PlanPruner, and the stock pruner where it is right."""

import copy
import json
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import models
import pytest
import torch
import torch_pruning as tp
from hypothesis import HealthCheck, given, settings
from models import batch, build, save_chats
from plans import dropping_plan, logits, query_plan, random_plan
from surgery.test_prune import MODELS, model_and_plan
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from transformers.models.llama.modeling_llama import LlamaMLP
from zoo import FAMILIES

from hipp_ext import PruningPlan, load_pruned, masked, prune, save_pruned
from hipp_ext.errors import CalibrationError, PlanError, UnsupportedModelError
from hipp_ext.groups import find_groups
from hipp_ext.integrations.torch_pruning import (
    HippImportance,
    PlanPruner,
    TorchPruningScorer,
    channel_taylor,
    confirm,
    to_tp_kwargs,
)
from hipp_ext.integrations.torch_pruning_importance import traceless_group
from hipp_ext.scorers import Magnitude, Taylor
from hipp_ext.units import plan_from_counts, top_units

pytestmark = pytest.mark.filterwarnings(
    "ignore:Unwrapped parameters detected", "ignore:.*no processor"
)
PAGE = Path(__file__).parents[2] / "docs" / "torch-pruning.md"


def mha(cls: str, **extra) -> nn.Module:
    """A text model with as many key heads as query heads."""
    import transformers

    config = models._text(
        getattr(transformers, f"{cls}Config"), heads=6, kv_heads=6, hidden=48, head_dim=8, **extra
    )
    return getattr(transformers, f"{cls}ForCausalLM")(config)


@pytest.fixture(autouse=True)
def _more_models(monkeypatch):
    monkeypatch.setitem(
        models.BUILDERS, "llama_mha", lambda: mha("Llama", attention_bias=True, mlp_bias=True)
    )
    monkeypatch.setitem(
        models.BUILDERS, "qwen3_mha", lambda: mha("Qwen3")
    )  # norms on queries and keys


def whole(plan: PruningPlan, kind: str) -> PruningPlan:
    """`plan`, all groups of `kind` left as they are."""
    kept = [tuple(range(e.width)) if e.kind == kind else e.kept for e in plan.groups]
    return plan.replace(
        groups=tuple(replace(e, kept=k) for e, k in zip(plan.groups, kept, strict=True))
    )


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []
    for (name, module), other in zip(model.named_modules(), expected.modules(), strict=True):
        for size in (
            "in_features",
            "out_features",
            "intermediate_size",
            "num_heads",
            "num_key_value_heads",
            "num_key_value_groups",
        ):
            assert getattr(module, size, None) == getattr(other, size, None), (name, size)


def stock_pruned(model: nn.Module, name: str, plan: PruningPlan) -> nn.Module:
    model = copy.deepcopy(model)
    tp.pruner.BasePruner(model, batch(name), **to_tp_kwargs(plan, model)).step()
    confirm(model, plan)
    return model


@pytest.mark.parametrize("name", ["llava_gqa", "qwen2_5_vl", "smolvlm", "llama", "qwen3"])
def test_plan_pruner_does_what_prune_does(name, tmp_path):
    model, inputs = build(name), batch(name)
    plan = random_plan(model)
    with masked(model, plan):
        expected = logits(model, inputs)
    small = prune(model, plan)
    PlanPruner(model, inputs, plan=plan).step()
    assert_same(model, small)
    assert torch.equal(logits(model, inputs), logits(small, inputs))
    assert torch.allclose(logits(model, inputs), expected, atol=1e-5)
    assert model.hipp_plan == plan and model.config.to_dict() == small.config.to_dict()
    for option in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        arguments = dict(**inputs, max_new_tokens=4, do_sample=False, **option)
        assert torch.equal(model.generate(**arguments), small.generate(**arguments)), option
    save_pruned(model, tmp_path / "a")
    assert torch.equal(logits(load_pruned(tmp_path / "a"), inputs), logits(small, inputs))
    model(**batch(name, labels=True)).loss.backward()
    assert all(
        model.get_submodule(g.consumer).weight.grad.abs().sum() > 0 for g in find_groups(model)
    )


@pytest.mark.parametrize(
    "name, implementation",
    [("llava", "eager"), ("llava", "sdpa"), ("llama_mha", "sdpa"), ("qwen3_mha", "eager")],
)  # what is traced differs
def test_the_stock_pruner_carries_out_heads_and_channels(name, implementation, tmp_path):
    model, inputs = build(name), batch(name)
    model.set_attn_implementation(implementation)
    plan = random_plan(model, seed=3)
    assert any(e.keep < e.width for e in plan.groups if e.kind == "attention")
    small, stock = prune(model, plan), stock_pruned(model, name, plan)
    assert_same(stock, small)
    assert torch.equal(logits(stock, inputs), logits(small, inputs)) and stock.hipp_plan == plan
    arguments = dict(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(stock.generate(**arguments), small.generate(**arguments))
    save_pruned(stock, tmp_path / "a")
    assert torch.equal(
        logits(load_pruned(tmp_path / "a", attn_implementation=implementation), inputs),
        logits(small, inputs),
    )


@pytest.mark.parametrize("name", ["llava_mqa", "qwen2_5_vl", "smolvlm", "llama", "qwen3"])
def test_the_stock_pruner_carries_out_ffn_plans_beside_grouped_queries(name):
    model = build(name)
    plan = whole(random_plan(model, seed=1), "attention")
    assert_same(stock_pruned(model, name, plan), prune(model, plan))


def test_blocks_that_go_whole_go_in_one_step():
    model = build("llava")
    plan = dropping_plan(model, "language.0.ffn", "language.1.attention", "language.1.ffn")
    expected = prune(model, plan)
    with pytest.raises(UnsupportedModelError, match="it drops no block whole. Use PlanPruner"):
        to_tp_kwargs(plan, model)
    with pytest.raises(PlanError, match="Blocks that keep nothing are dropped together"):
        PlanPruner(model, batch("llava"), plan=plan).step(interactive=True)
    PlanPruner(model, batch("llava"), plan=plan).step()
    assert_same(model, expected)


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(model_and_plan())
def test_any_plan_comes_out_the_same_or_is_refused(case):
    name, plan = case
    model = copy.deepcopy(MODELS[name])
    small = prune(model, plan)
    try:
        assert_same(stock_pruned(model, name, plan), small)
    except UnsupportedModelError as error:
        assert "query heads share a key head" in str(error) and name != "llava"
    PlanPruner(model, plan=plan).step()
    assert_same(model, small)


@pytest.mark.parametrize("kept", [1, -1])
def test_the_stock_pruner_meets_the_extremes(kept):
    model = build("llava")
    groups = find_groups(model)
    counts = [kept % g.width for g in groups]
    plan = plan_from_counts(groups, counts, {g.name: torch.randn(g.width) for g in groups})
    assert_same(stock_pruned(model, "llava", plan), prune(model, plan))


def test_a_plan_that_keeps_everything_changes_nothing():
    model = build("llava")
    plan = whole(whole(random_plan(model), "attention"), "ffn")
    before = copy.deepcopy(model)
    assert_same(stock_pruned(model, "llava", plan), before)
    assert list(PlanPruner(model, plan=plan).step(interactive=True)) == []
    assert_same(model, before)


@pytest.mark.parametrize("name", ["llava_gqa", "llama", "qwen3", "qwen2_5_vl", "smolvlm"])
def test_grouped_queries_are_refused_with_the_reason(name):
    model = build(name)
    with pytest.raises(
        UnsupportedModelError,
        match=r"language\.\d\.attention: \d query heads share a key head.*Use PlanPruner",
    ):
        to_tp_kwargs(random_plan(model), model)


def test_frozen_layers_and_vision_layers_and_odd_layers_are_refused():
    model = build("llava")
    plan = random_plan(model)
    both = random_plan(model, towers=("language", "vision"))
    with pytest.raises(
        UnsupportedModelError, match=r"vision\.0\.\w+: vision layers whose output is not read"
    ):
        to_tp_kwargs(both, model)
    with pytest.raises(PlanError, match="made for another model"):
        to_tp_kwargs(plan, build("llava_gqa"))
    with pytest.raises(UnsupportedModelError, match=r"language\.0\.\w+: its weights are frozen"):
        to_tp_kwargs(plan, copy.deepcopy(model).requires_grad_(False))
    model.model.language_model.layers[1].mlp.up_proj.__class__ = type("Quantised", (nn.Linear,), {})
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj is a Quantised"):
        to_tp_kwargs(plan, model)


def test_frozen_weights_gradients_and_training_survive_plan_pruner():
    model = build("llava_gqa").train()
    plan = random_plan(model, seed=2)
    entry = min((e for e in plan.groups if e.kind == "ffn"), key=lambda e: e.keep)
    name = f"model.language_model.layers.{entry.layer}.mlp.down_proj.weight"
    model.requires_grad_(False).get_parameter(name).requires_grad_(True)
    model(**batch("llava_gqa", labels=True)).loss.backward()
    gradient = model.get_parameter(name).grad.clone()
    PlanPruner(model, batch("llava_gqa"), plan=plan).step()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [name]
    assert (
        torch.equal(model.get_parameter(name).grad, gradient[:, list(entry.kept)])
        and entry.keep < 44
    )
    assert all(m.training for m in model.modules())


def test_both_towers():
    model, inputs = build("llava"), batch("llava")
    plan = random_plan(model, towers=("language", "vision"))
    small = prune(model, plan)
    PlanPruner(model, inputs, plan=plan).step()
    assert_same(model, small)


def test_groups_can_be_looked_into_and_passed_over():
    model, inputs = build("llava_gqa"), batch("llava_gqa")
    plan = random_plan(model, seed=2)
    small = prune(model, whole(plan, "attention"))
    groups = {g.name: g for g in find_groups(model)}
    seen = []
    for group in PlanPruner(model, inputs, plan=plan).step(interactive=True):
        dep, idxs = group[0]  # the first line of torch-pruning's own interactive example
        ours = groups[group.name]
        assert isinstance(group, tp.Group) and dep.target.module is model.get_submodule(
            ours.consumer
        )
        assert len(idxs) == len(group.units) * ours.columns and ours.consumer in str(group)
        assert [d.target.module for d, _ in group][1:] == [
            model.get_submodule(n) for n in ours.producers
        ]
        assert [len(i) for _, i in group][1:] == [len(group.units) * p.size for p in ours.produced]
        seen.append(group.name)
        if ours.kind == "ffn":
            group.prune()
    assert seen == [e.name for e in plan.groups if e.keep < e.width] and len(seen) > 3
    assert_same(model, small)
    assert model.hipp_plan == whole(plan, "attention")


def test_a_group_can_lose_units_of_ones_own_choice():
    model, inputs = build("llava_gqa"), batch("llava_gqa")
    plan = random_plan(model, seed=2)
    entries = [replace(e, kept=tuple(u for u in range(e.width) if u != 1)) for e in plan.groups]
    own = prune(model, plan.replace(groups=tuple(entries)))
    plan = plan.replace(groups=tuple(replace(e, kept=(0,)) for e in plan.groups))
    pruner = PlanPruner(model, inputs, plan=plan)
    for group in pruner.step(interactive=True):
        size = len(group[0].idxs) // len(group.units)
        group.prune(range(size, 2 * size))
        with pytest.raises(PlanError, match=f"{group.name} was pruned already"):
            group.prune()
    assert_same(model, own)


def test_weights_of_inputs_by_outputs_are_pruned_by_plan_and_shown_to_nothing_else():
    model, inputs = FAMILIES["gpt2"].build(), FAMILIES["gpt2"].batch()
    plan = random_plan(model)
    pruner = PlanPruner(copy.deepcopy(model), inputs, plan=plan)
    scores = {g.name: torch.rand(g.width) for g in find_groups(model)}
    channels = copy.deepcopy(pruner)
    for refused in (
        lambda: next(channels.step(interactive=True)),
        lambda: to_tp_kwargs(plan, model),
        lambda: TorchPruningScorer(tp.importance.LAMPImportance())(model),
        lambda: HippImportance(scores, model=model),
    ):
        with pytest.raises(
            UnsupportedModelError, match=r"c_(proj|attn) is a Conv1D.*\(outputs, inputs\) alone"
        ):
            refused()
    pruner.step()
    assert torch.equal(logits(pruner.model, inputs), logits(prune(model, plan), inputs))


@pytest.mark.parametrize("name", ["llava_gqa", "llava_mqa", "qwen2_5_vl", "llama", "qwen3"])
def test_query_heads_go_the_same_way_through_plan_pruner(name):
    model, inputs = build(name), batch(name)
    plan, step_by_step, again = query_plan(model), copy.deepcopy(model), copy.deepcopy(model)
    small = prune(model, plan)
    with pytest.raises(
        UnsupportedModelError,
        match=r"language\.\d\.query_heads: it does not keep the number.*Use PlanPruner",
    ):
        to_tp_kwargs(plan, model)
    pruner = PlanPruner(model, inputs, plan=plan)
    pruner.step()
    assert_same(model, small)
    assert model.hipp_plan == plan and model.config.to_dict() == small.config.to_dict()
    confirm(model, plan)
    for group in PlanPruner(step_by_step, inputs, plan=plan).step(interactive=True):
        group.prune()
    assert_same(step_by_step, small)
    assert step_by_step.hipp_plan == plan
    PlanPruner(again, inputs, plan=plan).load_pruning_history(pruner.pruning_history())
    assert_same(again, small)


@pytest.mark.parametrize("dropped", [(), ("language.1.attention", "language.1.ffn")])
def test_a_model_that_was_pruned_before_carries_the_plan_in_total(dropped):
    dense, inputs = build("llava"), batch("llava")
    first = dropping_plan(dense, *dropped, half=["language.0.ffn", "language.2.ffn"])
    once = prune(dense, first)
    second = random_plan(once, seed=2).replace(notes={"second": True})
    small = prune(once, second)
    assert small.hipp_plan.pruning_ratio > first.pruning_ratio
    planned, chosen = copy.deepcopy(once), copy.deepcopy(once)
    PlanPruner(planned, inputs, plan=second).step()
    for group in PlanPruner(chosen, inputs, plan=second).step(interactive=True):
        group.prune()
    for model in (planned, chosen, stock_pruned(once, "llava", second)):
        assert_same(model, small)
        assert model.hipp_plan == small.hipp_plan
        assert_same(prune(dense, model.hipp_plan), small)
        confirm(model, second)  # it is so already
        assert model.hipp_plan == small.hipp_plan


def test_every_kv_group_loses_the_same_number_of_query_heads():
    model, plan = build("llava_gqa"), query_plan(build("llava_gqa"))
    before = copy.deepcopy(model)
    for group in PlanPruner(model, plan=plan).step(interactive=True):
        if group.name == "language.0.query_heads":
            with pytest.raises(PlanError, match=r"must keep the same number; they keep \[3, 4\]"):
                group.prune(range(6))
    with pytest.raises(PlanError, match="must keep the same number"):
        PlanPruner(model, plan=plan).load_pruning_history([[O_PROJ, False, list(range(6))]])
    assert_same(model, before)


def test_scores_of_query_heads_are_an_importance():
    model = build("llava_gqa")
    scores = {"language.0.query_heads": torch.arange(8.0)}
    importance = HippImportance(scores, model=model)
    group = traceless_group(model, find_groups(model, attention_unit="query")[0])
    assert torch.equal(importance(group), torch.arange(8.0).repeat_interleave(6))
    with pytest.raises(PlanError, match=r"language\.0\.query_heads has 8 units, and 2 scores"):
        HippImportance({"language.0.query_heads": torch.ones(2)}, model=model)
    ranked = TorchPruningScorer(tp.importance.MagnitudeImportance())(
        model, groups=find_groups(model, attention_unit="query")
    )
    assert ranked["language.0.query_heads"].shape == (8,)


def test_the_history_is_plain_json_and_can_be_done_again():
    model, inputs = build("llava_gqa"), batch("llava_gqa")
    plan, again = random_plan(model), copy.deepcopy(model)
    pruner = PlanPruner(model, inputs, plan=plan)
    pruner.step()
    history = json.loads(json.dumps(pruner.pruning_history()))
    assert len(history) == sum(e.keep < e.width for e in plan.groups)
    replayed = PlanPruner(again, inputs, plan=plan)
    replayed.load_pruning_history(history)
    assert_same(again, model)
    assert replayed.pruning_history() == history and again.hipp_plan == plan


def test_a_history_of_the_stock_pruner_can_be_done_again():
    model, inputs = build("llava"), batch("llava")
    plan, again = random_plan(model), copy.deepcopy(model)
    stock = tp.pruner.BasePruner(model, inputs, **to_tp_kwargs(plan, model))
    stock.step()
    confirm(model, plan)
    assert {is_out for _, is_out, _ in stock.pruning_history()} == {True, False}
    PlanPruner(again, inputs, plan=plan).load_pruning_history(stock.pruning_history())
    assert_same(again, model)


O_PROJ = "model.language_model.layers.0.self_attn.o_proj"
HISTORIES = {
    "half a unit": (
        [O_PROJ, False, list(range(12))],
        r"language\.0\.attention has 2 units of 24 channels; these are not whole",
    ),
    "twice the same": ([O_PROJ, False, list(range(24)) * 2], "not whole units"),
    "out of range": ([O_PROJ, False, list(range(48, 72))], "not whole units"),
    "all": ([O_PROJ, False, list(range(48))], "all 2 units were to be removed"),
    "another layer": (["lm_head", True, [0]], "The output channels of lm_head belong to no group"),
    "the wrong side": (
        [O_PROJ, True, list(range(24))],
        "The output channels of .*o_proj belong to no group",
    ),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_a_bad_history_changes_nothing(name):
    entry, message = HISTORIES[name]
    model = build("llava_gqa")
    before = copy.deepcopy(model)
    pruner = PlanPruner(model, plan=random_plan(model))
    good = ["model.language_model.layers.1.mlp.down_proj", False, [3, 5]]
    with pytest.raises(PlanError, match=message):
        pruner.load_pruning_history([good, entry])
    assert_same(model, before)
    assert pruner.pruning_history() == []


def test_a_plan_is_carried_out_once():
    model = build("llama")
    pruner = PlanPruner(model, plan=random_plan(model))
    pruner.step()
    once = copy.deepcopy(model)
    for again in (
        pruner.step,
        lambda: pruner.step(interactive=True),
        lambda: pruner.load_pruning_history([]),
    ):
        with pytest.raises(PlanError, match="carried out already"):
            again()
    assert_same(model, once)


def test_another_models_plan_and_unfit_inputs_are_refused_before_anything_changes():
    model = build("llava")
    with pytest.raises(PlanError, match="made for another model than this Llava"):
        PlanPruner(model, batch("llava"), plan=random_plan(build("llava_gqa")))
    with pytest.raises(
        CalibrationError, match="Llava.* does not run on example_inputs: You must specify"
    ):
        PlanPruner(model, {"words": torch.ones(1, 3)}, plan=random_plan(model))


def test_inputs_come_in_every_form_that_torch_pruning_takes():
    ids = batch("llama")["input_ids"]
    for inputs, forward_fn in ((ids, None), ((ids,), None), ("any", lambda model, _: model(ids))):
        model = build("llama")
        plan = random_plan(model)
        PlanPruner(model, inputs, plan=plan, forward_fn=forward_fn).step()
        assert {g.name: g.width for g in find_groups(model)} == plan.keep_counts


class RigidMLP(LlamaMLP):
    def forward(self, x):
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(hidden.view(*x.shape[:-1], 44))


def test_a_forward_that_insists_on_its_old_widths_is_noticed():
    model = build("llama")
    model.model.layers[1].mlp.__class__ = RigidMLP
    with pytest.raises(
        UnsupportedModelError, match="can be pruned, and are not: .* it does not run: RuntimeError"
    ):
        PlanPruner(model, batch("llama"), plan=random_plan(model)).step()


def test_what_cannot_be_sliced_changes_nothing_and_can_be_tried_again():
    model = build("llama")
    plan, before = random_plan(model), copy.deepcopy(model)
    down = model.model.layers[2].mlp.down_proj
    down.__class__ = type("Quantised", (nn.Linear,), {})
    pruner = PlanPruner(model, plan=plan)
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.mlp\.down_proj is a Quantised"):
        pruner.step()
    assert_same(model, before)
    down.__class__ = nn.Linear
    pruner.step()
    assert_same(model, prune(before, plan))


def test_confirm_notices_what_was_not_done():
    model = build("llava")
    plan = random_plan(model)
    with pytest.raises(
        PlanError,
        match=r"not what the plan says: language\.0\.\w+ has \d+ units of \d+ parameters, planned",
    ):
        confirm(model, plan)
    with pytest.raises(PlanError, match="it has other groups"):
        confirm(prune(model, plan), plan.replace(groups=plan.groups[:-1]))


# Scores into torch-pruning


def stock(model, name, importance, **arguments):
    """The stock pruner on one model's FFN and heads, as a user would call it."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding | nn.Conv2d)]
    wanted = arguments.pop("layers")
    return tp.pruner.BasePruner(
        model,
        {**batch(name), "use_cache": False},
        importance=importance,
        output_transform=lambda o: o.logits,
        ignored_layers=[m for m in layers if m not in wanted],
        in_channel_groups={},
        out_channel_groups={},
        **arguments,
    )


@pytest.mark.parametrize("name", ["llava", "smolvlm", "llama"])
def test_our_scores_decide_which_channels_the_stock_pruner_keeps(name):
    model = build(name)
    groups = [g for g in find_groups(model) if g.kind == "ffn"]
    scores = Taylor()(model, [batch(name, labels=True)], groups=groups)
    dense = copy.deepcopy(model)
    layers = [model.get_submodule(n) for g in groups for n in g.producers]
    stock(model, name, HippImportance(scores), layers=layers, pruning_ratio=0.5).step()
    for g in groups:
        kept = list(top_units(scores[g.name], g.width // 2))
        assert torch.equal(
            model.get_submodule(g.consumer).weight, dense.get_submodule(g.consumer).weight[:, kept]
        )
        assert torch.equal(
            model.get_submodule(g.producers[0]).weight,
            dense.get_submodule(g.producers[0]).weight[kept],
        )


@pytest.mark.parametrize("per_head", [False, True])
def test_our_scores_decide_which_heads_the_stock_pruner_keeps(per_head):
    name = "llava_gqa" if per_head else "llava"  # 8 query heads on 2 key heads; 4 heads
    model = build(name)
    model.set_attn_implementation("eager")
    groups = [g for g in find_groups(model) if g.kind == "attention"]
    heads = 8 if per_head else 4
    scores = {g.name: torch.randperm(heads).float() for g in groups}
    dense = copy.deepcopy(model)
    layers = [model.get_submodule(n) for g in groups for n in g.producers]
    numbers = {
        model.get_submodule(n): heads if "q_proj" in n else g.width
        for g in groups
        for n in g.producers
    }
    ratio = 0.25 if per_head else 0.5  # one of four query heads per key head, two of four heads
    stock(
        model,
        name,
        HippImportance(scores),
        layers=layers,
        num_heads=numbers,
        prune_num_heads=True,
        prune_head_dims=False,
        pruning_ratio=0.5,
        head_pruning_ratio=ratio,
    ).step()
    for g in groups:
        values = scores[g.name]
        if per_head:
            kept = [4 * i + u for i in range(2) for u in top_units(values[4 * i : 4 * i + 4], 3)]
        else:
            kept = list(top_units(values, 2))
        size = g.width * g.columns // heads
        columns = [h * size + i for h in kept for i in range(size)]
        assert torch.equal(
            model.get_submodule(g.consumer).weight,
            dense.get_submodule(g.consumer).weight[:, columns],
        )


def cnn() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A ResNet-10 that has seen no data, pictures, and their classes."""
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7).eval()
    return model, torch.randn(5, 3, 32, 32), torch.arange(5)


def cross_entropy(model, data):
    return nn.functional.cross_entropy(model(data[0]), data[1])


@pytest.mark.parametrize("pruner", [tp.pruner.BasePruner, tp.pruner.MetaPruner])
def test_taylor_scores_prune_a_cnn(pruner):
    model, pictures, classes = cnn()
    dense = copy.deepcopy(model)
    scores = channel_taylor(model, [(pictures, classes)], cross_entropy)
    assert set(scores) == {
        n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
    }
    pruner(
        model,
        pictures[:1],
        importance=HippImportance(scores),
        pruning_ratio=0.5,
        ignored_layers=[model.fc],
        in_channel_groups={},
        out_channel_groups={},
    ).step()
    assert model(pictures).shape == (5, 7)
    # A layer of its own, and two that the residual stream couples.
    inner = list(top_units(scores["layer2.0.conv1"], 64))
    outer = list(top_units((scores["layer2.0.conv2"] + scores["layer2.0.downsample.0"]) / 2, 64))
    assert torch.equal(model.layer2[0].conv2.weight, dense.layer2[0].conv2.weight[outer][:, inner])
    assert torch.equal(model.layer2[0].bn1.weight, dense.layer2[0].bn1.weight[inner])


def test_global_ranking_and_iterative_steps_on_a_cnn():
    model, pictures, classes = cnn()
    scores = channel_taylor(model, [(pictures, classes)], cross_entropy)
    pruner = tp.pruner.BasePruner(
        model,
        pictures[:1],
        importance=HippImportance(scores),
        pruning_ratio=0.5,
        iterative_steps=2,
        global_pruning=True,
        ignored_layers=[model.fc],
        in_channel_groups={},
        out_channel_groups={},
    )
    pruner.step()
    with pytest.raises(
        PlanError,
        match=r"scores of .* are for \d+ channels and the layer has \d+ now.*HippImportance\(new",
    ):
        pruner.step()
    pruner.importance = HippImportance(channel_taylor(model, [(pictures, classes)], cross_entropy))
    pruner.current_step = 1
    pruner.step()
    widths = {
        m.out_channels / 2 ** (i // 3)
        for i, m in enumerate(m for m in model.modules() if isinstance(m, nn.Conv2d))
    }
    assert len(widths) > 3 and model(pictures).shape == (5, 7)


class Branches(nn.Module):
    """Two convs side by side: a channel of the second has another number where it is read."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.fc = (
            nn.Conv2d(3, 6, 3),
            nn.Conv2d(3, 10, 3),
            nn.Conv2d(16, 4, 3),
            nn.Linear(4, 3),
        )

    def forward(self, x):
        return self.fc(self.c(torch.cat([self.a(x), self.b(x)], 1).relu()).mean((2, 3)))


def test_concatenated_channels_keep_their_own_scores():
    model = Branches()
    dense = copy.deepcopy(model)
    scores = {n: torch.randperm(k).float() for n, k in (("a", 6), ("b", 10), ("c", 4))}
    tp.pruner.BasePruner(
        model,
        torch.randn(1, 3, 8, 8),
        importance=HippImportance(scores),
        pruning_ratio=0.5,
        ignored_layers=[model.fc],
        in_channel_groups={},
        out_channel_groups={},
    ).step()
    a, b, c = (list(top_units(scores[n], k)) for n, k in (("a", 3), ("b", 5), ("c", 2)))
    assert torch.equal(model.c.weight, dense.c.weight[c][:, a + [6 + i for i in b]])


def test_channel_taylor_is_the_derivative_of_a_gate():
    model, pictures, classes = cnn()
    model.train()
    before = copy.deepcopy(model.state_dict())
    batches = [(pictures[:2], classes[:2]), (pictures[2:], classes[2:])]
    scores = channel_taylor(model.requires_grad_(False), batches, cross_entropy)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items()) and model.training
    assert not any(m._forward_hooks for m in model.modules())
    conv, step, squares = model.layer3[0].conv1, 1e-2, 0.0
    model.eval()
    for data in batches:
        losses = []
        for sign in (1, -1):
            conv.weight.data[11] *= 1 + sign * step
            losses.append(cross_entropy(model, data).double())
            conv.weight.data[11] /= 1 + sign * step
        squares += ((losses[0] - losses[1]) / (2 * step)) ** 2 / len(batches)
    assert scores["layer3.0.conv1"][11] == pytest.approx(squares.sqrt().item(), rel=0.05)
    with pytest.raises(CalibrationError, match="at least one batch"):
        channel_taylor(model, [], cross_entropy)


BAD_SCORES = {
    "NaN": ({"fc": torch.tensor([1.0, float("nan"), 0])}, PlanError, "scores of fc hold NaN"),
    "two dimensions": (
        {"fc": torch.ones(1, 3)},
        PlanError,
        r"scores of fc must be a 1-D tensor, got shape \(1, 3\)",
    ),
    "a list": ({"fc": [1.0, 2, 3]}, PlanError, "must be a 1-D tensor, got list"),
    "too short": ({"a": torch.ones(3)}, PlanError, "a has 6 output channels, and 3 scores"),
    "unknown": (
        {"a": torch.ones(6), "conv9": torch.ones(6)},
        PlanError,
        r"Scores for \['conv9'\], which are neither groups nor",
    ),
    "a group": (
        {"language.0.ffn": torch.ones(6)},
        UnsupportedModelError,
        "not a transformers model",
    ),
}


@pytest.mark.parametrize("name", BAD_SCORES)
def test_bad_scores_are_refused(name):
    scores, error, message = BAD_SCORES[name]
    with pytest.raises(error, match=message):
        HippImportance(scores, model=Branches())
    with pytest.raises(error, match=message):
        tp.pruner.BasePruner(
            Branches(),
            torch.randn(1, 3, 8, 8),
            importance=HippImportance(scores),
            pruning_ratio=0.5,
            in_channel_groups={},
            out_channel_groups={},
        ).step()


def test_scores_of_a_wrong_length_are_refused_on_a_vlm():
    model = build("llava_gqa")
    with pytest.raises(PlanError, match="language.1.ffn has 44 units, and 22 scores"):
        HippImportance({"language.1.ffn": torch.ones(22)}, model=model)
    with pytest.raises(
        PlanError, match="language.1.attention has 2 or 8 KV groups or query heads, and 4 scores"
    ):
        HippImportance({"language.1.attention": torch.ones(4)}, model=model)
    with pytest.raises(PlanError, match="neither groups nor"):
        HippImportance({"language.7.ffn": torch.ones(44)}, model=model)


def test_groups_without_scores_raise_unless_they_are_to_be_skipped():
    model, pictures = Branches(), torch.randn(1, 3, 8, 8)
    arguments = dict(
        pruning_ratio=0.5, ignored_layers=[model.fc], in_channel_groups={}, out_channel_groups={}
    )
    scores = {"c": torch.randperm(4).float()}
    with pytest.raises(
        UnsupportedModelError,
        match=r"6 of 6 channels have no scores in the group of \['a \(Conv2d.*skip_unscored",
    ):
        tp.pruner.BasePruner(model, pictures, importance=HippImportance(scores), **arguments).step()
    tp.pruner.BasePruner(
        model, pictures, importance=HippImportance(scores, skip_unscored=True), **arguments
    ).step()
    assert (model.a.out_channels, model.b.out_channels, model.c.out_channels) == (6, 10, 2)


def test_attention_scores_that_torch_pruning_cannot_place_raise():
    model = build("llava_gqa")
    model.set_attn_implementation("eager")
    group = find_groups(model)[0]
    layers = [model.get_submodule(n) for n in group.producers]
    heads = dict(zip(layers, (8, 2, 2), strict=True))
    scores = {group.name: torch.ones(2)}
    with pytest.raises(
        UnsupportedModelError,
        match="12 of 12 channels have no scores in the group of .*Attention needs q_proj, k",
    ):
        stock(model, "llava_gqa", HippImportance(scores), layers=layers, pruning_ratio=0.5).step()
    by_layer = {group.producers[1]: torch.ones(12)}
    with pytest.raises(
        UnsupportedModelError, match="cannot say .* belong to .*k_proj.*Score its group, such as"
    ):
        stock(
            model,
            "llava_gqa",
            HippImportance(by_layer),
            layers=layers,
            num_heads=heads,
            pruning_ratio=0.5,
        ).step()
    with pytest.raises(PlanError, match="made without tracing"):
        TorchPruningScorer(HippImportance(scores))(model)


# Torch-pruning's importances as our scorers


@pytest.mark.parametrize("name", ["llava", "llava_gqa"])
def test_scores_survive_the_way_there_and_back(name):
    model = build(name)
    scores = Magnitude()(model)
    back = TorchPruningScorer(HippImportance(scores, model=model))(model)
    assert all(torch.allclose(back[n], s) for n, s in scores.items())


@pytest.mark.parametrize(
    "importance", [tp.importance.GroupMagnitudeImportance(p=1), tp.importance.LAMPImportance()]
)
def test_stock_importances_score_as_on_traced_groups(importance):
    model, inputs = build("llava"), batch("llava")
    scorer = TorchPruningScorer(importance)
    scores = scorer(model)
    assert scorer.name == f"torch-pruning {type(importance).__name__}"
    graph = tp.DependencyGraph().build_dependency(
        model, {**inputs, "use_cache": False}, output_transform=lambda o: o.logits, verbose=False
    )
    for g in find_groups(model):
        consumer = model.get_submodule(g.consumer)
        traced = importance(
            graph.get_pruning_group(
                consumer, tp.prune_linear_in_channels, list(range(consumer.in_features))
            )
        )
        assert torch.allclose(scores[g.name], traced.view(g.width, -1).mean(1), rtol=1e-4), g.name


def test_keys_and_values_count_under_grouped_queries():
    model = build("llava_gqa")
    scorer = TorchPruningScorer(
        tp.importance.GroupMagnitudeImportance(p=2, normalizer=None, group_reduction="sum")
    )
    scores, ours = scorer(model), Magnitude()(model)
    for g in find_groups(model):
        assert torch.allclose(scores[g.name] * g.columns, ours[g.name].square(), rtol=1e-4), g.name


def test_taylor_takes_its_gradients_from_the_calibration_and_leaves_no_trace():
    model = build("llava").train()
    model.model.language_model.layers[0].requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    state = [(p.requires_grad, p.grad) for p in model.parameters()]
    batches = [batch("llava", labels=True, seed=s) for s in range(2)]
    importance = tp.importance.GroupTaylorImportance(multivariable=True, normalizer=None)
    scores = TorchPruningScorer(importance)(model, batches)
    assert all(
        p.requires_grad == flag and p.grad is grad
        for p, (flag, grad) in zip(model.parameters(), state, strict=True)
    )
    assert model.training
    model.requires_grad_(True).eval().zero_grad()
    for data in batches:
        model(**data).loss.backward()
    own = TorchPruningScorer(importance, gradients=False)(model)
    assert all(torch.allclose(own[n], s, rtol=1e-4) for n, s in scores.items())
    group = find_groups(model)[1]
    up, gate, down = (
        model.get_submodule(n).weight
        for n in (group.producers[1], group.producers[0], group.consumer)
    )
    expected = sum(((w * w.grad).sum(d)).abs() for w, d in ((up, 1), (gate, 1), (down, 0))) / 3
    assert torch.allclose(scores[group.name], expected, rtol=1e-4)


def test_a_plan_made_with_a_stock_importance():
    model, inputs = build("qwen2_5_vl"), batch("qwen2_5_vl")
    groups = find_groups(model)
    scores = TorchPruningScorer(tp.importance.GroupMagnitudeImportance())(model)
    plan = plan_from_counts(groups, [g.width // 2 for g in groups], scores)
    PlanPruner(model, inputs, plan=plan).step()
    assert {g.width for g in find_groups(model)} == {1, 22}


BAD_IMPORTANCES = {
    "nothing": (
        tp.importance.BNScaleImportance(),
        "BNScaleImportance gave None for language.0.attention, which has 40 channels",
    ),
    "a scalar": (lambda group: torch.tensor(1.0), r"gave a tensor of shape \(\) for language.0"),
    "a row": (lambda group: torch.ones(1, len(group[0].idxs)), r"shape \(1, 40\)"),
    "NaN": (lambda group: torch.full((len(group[0].idxs),), float("nan")), "NaN or infinity"),
}


@pytest.mark.parametrize("name", BAD_IMPORTANCES)
def test_importances_that_do_not_score_every_channel_are_refused(name):
    importance, message = BAD_IMPORTANCES[name]
    with pytest.raises(UnsupportedModelError, match=message):
        TorchPruningScorer(importance)(build("llava"))


def test_taylor_without_labels_says_so():
    with pytest.raises(
        CalibrationError, match="needs gradients: calibration batch 0 has no labels"
    ):
        TorchPruningScorer(tp.importance.TaylorImportance())(build("llama"), [batch("llama")])


# Packaging and documentation


def run_python(code: str) -> str:
    return subprocess.check_output(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], text=True, timeout=120
    ).strip()


def test_importing_is_cheap_and_without_torch_pruning_an_error_names_the_extra():
    message, used = run_python("""
        import sys, time, hipp_ext
        assert "torch_pruning" not in sys.modules
        sys.modules["torch_pruning"] = None
        from hipp_ext.errors import MissingExtraError
        try:
            import hipp_ext.integrations.torch_pruning
        except MissingExtraError as error:
            print(error)
        for name in [n for n in sys.modules if n.split(".")[0] in ("hipp_ext", "torch_pruning")]:
            del sys.modules[name]
        import torch_pruning
        start = time.process_time()
        import hipp_ext.integrations.torch_pruning
        print(time.process_time() - start)
    """).splitlines()
    assert (
        message
        == 'torch-pruning is not installed. Install it with: pip install "hipp-ext[torch-pruning]"'
    )
    assert float(used) < 1


def test_the_page_runs_as_written(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 2
    from hipp_ext import testbed

    dense, processor = testbed.load()
    dense.save_pretrained(tmp_path / "llava-1.5-7b-hf")
    processor.save_pretrained(tmp_path / "llava-1.5-7b-hf")
    save_chats(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    pruned = load_pruned("pruned")
    assert {g.name: g.width for g in find_groups(pruned)} == names["plan"].keep_counts
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in dense.parameters())
    assert_same(names["stock"], names["model"])
    assert names["cnn"].conv1.out_channels == 32
