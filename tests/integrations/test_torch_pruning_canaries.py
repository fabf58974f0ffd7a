"""What torch-pruning does wrong today and we work around.

A failure here is good news: the message says what may go.
"""

import collections
import copy
from importlib.metadata import version

import pytest
import torch
import torch_pruning as tp
from models import batch, build, llava
from plans import random_plan
from torch import nn
from transformers import BatchEncoding

from hipp_ext.groups import find_groups
from hipp_ext.integrations.torch_pruning import PlanPruner, to_tp_kwargs

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:Unwrapped parameters detected"),
]
GROUP_LIMIT = 1500  # members; the largest group that ends has 59
PLAN_METHOD = "to_tp_kwargs (integrations/torch_pruning_stock.py)"
REFUSALS = "_stock_fails (integrations/torch_pruning_stock.py)"


def still(misbehaves: bool, may_go: str) -> None:
    assert misbehaves, f"torch-pruning {version('torch-pruning')} has mended this. May go: {may_go}"


class EndlessError(Exception):
    pass


@pytest.fixture
def bounded(monkeypatch):
    """Groups that never stop growing raise instead."""
    add = tp.Group.add_dep

    def add_dep(self, dep, idxs):
        if len(self) > GROUP_LIMIT:
            raise EndlessError
        add(self, dep, idxs)

    monkeypatch.setattr(tp.Group, "add_dep", add_dep)


def ends(model: nn.Module, inputs: dict) -> bool:
    try:
        stock(model, inputs)
    except EndlessError:
        return False
    return True


def stock(model: nn.Module, inputs: dict, **arguments):
    """The stock pruner on the language tower, as torch-pruning's own LLM example builds it."""
    producers = {model.get_submodule(n) for g in find_groups(model) for n in g.producers}
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding | nn.Conv2d)]
    heads = {
        model.get_submodule(part.layer): g.width * part.size // g.produced[1].size
        for g in find_groups(model)
        if g.kind == "attention"
        for part in g.produced
    }
    usual = dict(
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.0,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        output_transform=lambda out: out.logits,
        in_channel_groups={},
        out_channel_groups={},
        ignored_layers=[m for m in layers if m not in producers],
    )
    return tp.pruner.BasePruner(model, inputs, **(usual | arguments))


def uncached(name: str) -> dict:
    return {**batch(name), "use_cache": False}


def eager(name: str) -> nn.Module:
    model = build(name)
    model.set_attn_implementation("eager")
    return model


def widths(model: nn.Module) -> list[tuple[int, int]]:
    return [(g.width, g.columns) for g in find_groups(model)]


def test_a_cache_makes_groups_endless(bounded):
    assert ends(eager("llava"), uncached("llava"))
    still(not ends(eager("llava"), batch("llava")), f"use_cache=False in {PLAN_METHOD}")


def test_two_query_heads_per_key_head_make_groups_endless(bounded):
    assert ends(eager("llava_gqa"), uncached("llava_gqa"))
    still(not ends(eager("llama"), uncached("llama")), f"'does not come back' in {REFUSALS}")


def test_a_cache_in_the_output_cannot_be_traced():
    model = eager("llava")
    misbehaves = False
    try:
        stock(model, batch("llava"), output_transform=None)
    except AttributeError as error:
        misbehaves = "grad_fn" in str(error)
    still(misbehaves, f"`.logits` in forward_fn of {PLAN_METHOD}")


def test_batch_encodings_are_not_taken_for_mappings():
    misbehaves = False
    try:
        stock(eager("llava"), BatchEncoding(uncached("llava")))  # type: ignore[arg-type]
    except (TypeError, AttributeError):
        misbehaves = True
    still(misbehaves, f"forward_fn in {PLAN_METHOD}, with the other canaries on it")


def test_head_ratios_without_a_width_ratio_do_nothing():
    model = eager("llava")
    before = widths(model)
    stock(model, uncached("llava"), head_pruning_ratio=0.5).step()
    still(
        widths(model) == before, f"the ratio of 0.5 for heads in pruning_ratio_dict, {PLAN_METHOD}"
    )


def test_an_exact_ratio_can_remove_one_channel_too_many():
    layer, head = nn.Linear(5, 1000), nn.Linear(1000, 3)
    model = nn.Sequential(layer, nn.ReLU(), head)
    tp.pruner.BasePruner(
        model,
        torch.randn(2, 5),
        importance=tp.importance.MagnitudeImportance(),
        pruning_ratio=191 / 1000,
        ignored_layers=[head],
        in_channel_groups={},
        out_channel_groups={},
    ).step()
    still(layer.out_features == 1000 - 192, f"the half unit in the ratios of {PLAN_METHOD}")


def test_all_pruners_share_their_default_dictionaries():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 6, 3))
    importance = tp.importance.MagnitudeImportance()
    first = tp.pruner.BasePruner(model, torch.randn(1, 4, 9, 9), importance=importance)
    second = tp.pruner.BasePruner(
        copy.deepcopy(model), torch.randn(1, 4, 9, 9), importance=importance
    )
    shared = first.out_channel_groups is second.out_channel_groups
    first.out_channel_groups.clear()
    first.in_channel_groups.clear()
    still(shared, f"in_channel_groups and out_channel_groups in {PLAN_METHOD}")


def test_norms_of_queries_and_keys_keep_heads_from_being_pruned(monkeypatch):
    import models

    monkeypatch.setitem(models.BUILDERS, "qwen3_mha", _qwen3_mha)
    model = eager("qwen3_mha")
    plan = random_plan(model, seed=3)
    arguments = to_tp_kwargs(plan, model)
    norms = [p for p in arguments["ignored_layers"] if isinstance(p, nn.Parameter)]
    assert len(norms) == 2 * sum(e.keep < e.width for e in plan.groups if e.kind == "attention") > 0
    arguments["ignored_layers"] = [
        m for m in arguments["ignored_layers"] if isinstance(m, nn.Module)
    ]
    tp.pruner.BasePruner(model, batch("qwen3_mha"), **arguments).step()
    attention = [g.width for g in find_groups(model) if g.kind == "attention"]
    still(attention == [6, 6, 6], f"_head_norms in ignored_layers, {PLAN_METHOD}")


def _qwen3_mha() -> nn.Module:
    from models import _text
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(_text(Qwen3Config, heads=6, kv_heads=6, hidden=48, head_dim=8))


def test_key_heads_never_go_under_grouped_queries():
    model = eager("llava_gqa")
    attention = [g for g in find_groups(model) if g.kind == "attention"]
    pruner = stock(model, uncached("llava_gqa"), pruning_ratio=0.5, head_pruning_ratio=0.25)
    pruner.step()
    rows = collections.Counter(model.get_submodule(g.producers[1]).out_features for g in attention)
    still(rows == {12: 3}, f"the refusal of grouped queries in {REFUSALS}")


def test_heads_are_said_to_be_gone_that_are_still_there():
    model = eager("llava_gqa")
    query = model.get_submodule(find_groups(model)[0].producers[0])
    pruner = stock(
        model, uncached("llava_gqa"), pruning_ratio=0.5, head_pruning_ratio=0.75
    )  # two query, two key heads
    pruner.step()
    still(
        (query.out_features, pruner.num_heads[query]) == (8 * 6, 2),
        f"the refusal of grouped queries in {REFUSALS}",
    )


def test_grouped_queries_fail_under_sdpa():
    model = build("llava_gqa")
    model.set_attn_implementation("sdpa")
    misbehaves = False
    try:
        stock(model, uncached("llava_gqa"), pruning_ratio=0.5, head_pruning_ratio=0.25).step()
    except RuntimeError as error:
        misbehaves = "is invalid for input of size" in str(error)
    still(misbehaves, f"the refusal of grouped queries in {REFUSALS}")


def test_pruning_unfreezes():
    layer, head = nn.Linear(5, 8).requires_grad_(False), nn.Linear(8, 3)
    tp.prune_linear_out_channels(layer, [1, 2])
    tp.prune_linear_in_channels(head, [1, 2])
    still(layer.weight.requires_grad, f"the refusal of frozen weights in {REFUSALS}")


def test_frozen_models_are_left_whole_in_silence():
    model = build("llava")
    plan = random_plan(model)
    arguments = to_tp_kwargs(plan, model)
    before = widths(model)
    tp.pruner.BasePruner(model.requires_grad_(False), batch("llava"), **arguments).step()
    still(widths(model) == before, f"the refusal of frozen weights in {REFUSALS}")


def test_vision_layers_that_are_not_read_are_missing_from_the_graph():
    model = eager("llava")
    layers = model.model.vision_tower.encoder.layers
    graph = tp.DependencyGraph().build_dependency(
        model, uncached("llava"), output_transform=lambda o: o.logits, verbose=False
    )
    assert layers[0].mlp.fc1 in graph.module2node
    still(layers[1].mlp.fc1 not in graph.module2node, f"the refusal of vision towers in {REFUSALS}")


@pytest.mark.parametrize("scores", ["nan", "short"])
def test_wrong_scores_are_taken(scores):
    layer, head = nn.Linear(5, 8), nn.Linear(8, 3)
    values = torch.full((8,), float("nan")) if scores == "nan" else torch.rand(4)
    tp.pruner.BasePruner(
        nn.Sequential(layer, head),
        torch.randn(2, 5),
        importance=lambda group: values,
        pruning_ratio=0.5,
        ignored_layers=[head],
        in_channel_groups={},
        out_channel_groups={},
    ).step()
    still(
        layer.out_features < 8, "nothing, but HippImportance may leave this check to torch-pruning"
    )


def test_the_forward_of_a_model_is_left_in_eval_mode():
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)).train()
    tp.DependencyGraph().build_dependency(model, torch.randn(2, 5))
    still(not model.training, "'leaves the model in eval mode' in the docstring of to_tp_kwargs")


def test_plan_pruner_suffers_from_none_of_this(bounded):
    model = llava(heads=4, kv_heads=2).train().requires_grad_(False)
    plan = random_plan(model, towers=("language", "vision"))
    PlanPruner(model, batch("llava"), plan=plan).step()
    assert {g.name: g.width for g in find_groups(model, ("language", "vision"))} == plan.keep_counts
    assert model.training and not any(p.requires_grad for p in model.parameters())
