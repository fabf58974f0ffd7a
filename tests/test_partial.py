"""Models of which only some blocks can be pruned: refused with what would be left whole, or pruned
in part and reported.
"""

import json

import pytest
import torch
from command import hipp
from models import batch
from test_families import logits, text_model
from torch import nn

from hipp_ext import HiPPPlanner, Preference, PruningPlan, load_pruned, masked, prune, save_pruned
from hipp_ext.allocators import Uniform
from hipp_ext.errors import BudgetError, PlanError, UnsupportedModelError
from hipp_ext.groups import (
    LeftWhole,
    find_groups,
    find_skips,
    left_whole,
    left_whole_lines,
    tower_layers,
)
from hipp_ext.scorers import Magnitude
from hipp_ext.surgery.slices import sliced
from hipp_ext.units import plan_from_counts
from hipp_ext.verification import without_verification

MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
HYBRIDS = {  # the first layer has no attention, the second has
    "Lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "Bamba": MAMBA | {"attn_layer_indices": [1]},
    "Qwen3Next": {
        "mlp_only_layers": [0, 1],
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 6,
    },
}
MIXERS = {
    "Lfm2": LeftWhole(
        module="model.layers.0.conv", type="Lfm2ShortConv", reason="no block of a known kind"
    ),
    "Bamba": LeftWhole(
        module="model.layers.0.mamba", type="BambaMixer", reason="no block of a known kind"
    ),
    "Qwen3Next": LeftWhole(
        module="model.layers.0.linear_attn",
        type="Qwen3NextGatedDeltaNet",
        reason="no block of a known kind",
    ),
}


def hybrid(name: str) -> nn.Module:
    return text_model(name, **HYBRIDS[name])


@pytest.fixture(scope="module")
def lfm2() -> nn.Module:
    return hybrid("Lfm2")


def test_what_would_be_left_whole_is_named_and_how_to_accept_it(lfm2):
    for ask in (
        lambda: find_groups(lfm2),
        lambda: Magnitude()(lfm2),
        lambda: Uniform(pruning_ratio=0.3, scorer=Magnitude()).plan(lfm2),
        lambda: HiPPPlanner(Preference(1, 1, 1)).plan(lfm2, calibration=[batch("llama")]),
    ):
        with pytest.raises(
            UnsupportedModelError,
            match=r"left whole: model.layers.0.conv \(Lfm2ShortConv\): no block of a known kind"
            r".*q_proj \+ k_proj \+ v_proj.*--partial report",
        ):
            ask()


def test_only_refuse_and_report_are_known(lfm2):
    for ask in (
        lambda: find_groups(lfm2, partial="skip"),  # type: ignore[arg-type]
        lambda: Uniform(pruning_ratio=0.3, partial="skip"),  # type: ignore[arg-type]
        lambda: HiPPPlanner(Preference(1, 1, 1), partial="skip"),  # type: ignore[arg-type]
    ):
        with pytest.raises(BudgetError, match="partial='skip': one of refuse, report is needed"):
            ask()


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_is_pruned_in_part_saved_and_loaded(name, tmp_path):
    model, inputs = hybrid(name), batch("llama")
    assert left_whole(model) == (MIXERS[name],)
    groups = find_groups(model, partial="report")
    assert [g.name for g in groups] == ["language.0.ffn", "language.1.attention", "language.1.ffn"]
    assert not any(g.removable for g in groups)
    allocator = Uniform(pruning_ratio=0.4, scorer=Magnitude(), partial="report")
    plan = allocator.plan(model)
    assert plan.left_whole == (MIXERS[name],)
    assert PruningPlan.from_json(plan.to_json()) == plan
    with masked(model, plan):
        expected = logits(model, inputs)
    small = prune(model, plan)
    assert torch.allclose(logits(small, inputs), expected, atol=1e-5)
    with pytest.warns(UserWarning, match="no processor"):
        save_pruned(small, tmp_path / "small")
    loaded = load_pruned(tmp_path / "small")
    assert torch.equal(logits(loaded, inputs), logits(small, inputs))
    assert loaded.hipp_plan == plan


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_layer_without_any_of_its_units_keeps_its_mixer(name, tmp_path):
    model, inputs = hybrid(name), batch("llama")
    groups = find_groups(model, partial="report")
    plan = plan_from_counts(groups, [0, 0, 7], Magnitude()(model, groups=groups))
    with masked(model, plan):
        expected = logits(model, inputs)
    small = prune(model, plan)
    assert torch.allclose(logits(small, inputs), expected, atol=1e-5)
    assert len(tower_layers(small, "language")) == 2
    assert find_skips(small) == [(0, "ffn"), (1, "attention")]
    with pytest.warns(UserWarning, match="no processor"):
        save_pruned(small, tmp_path / "small")
    loaded = load_pruned(tmp_path / "small")
    assert torch.equal(logits(loaded, inputs), logits(small, inputs))
    assert loaded.hipp_plan == plan and find_skips(loaded) == find_skips(small)


def test_a_planner_remembers_what_it_was_told_and_what_stays_whole(lfm2, tmp_path):
    planner = HiPPPlanner(
        Preference(1, 1, 1), pruning_ratio=0.3, partial="report", cache=tmp_path / "cache"
    )
    plan = planner.plan(lfm2, calibration=[batch("llama")])
    assert plan.left_whole == (MIXERS["Lfm2"],)
    planner.save(tmp_path / "planner")
    loaded = HiPPPlanner.load(tmp_path / "planner")
    assert loaded.partial == "report" and loaded.plan(lfm2) == plan
    again = HiPPPlanner(
        Preference(1, 1, 1), pruning_ratio=0.3, partial="report", cache=tmp_path / "cache"
    )
    told: list[str] = []
    assert again.plan(lfm2, calibration=[batch("llama")], log=told.append) == plan
    assert "as measured before" in told[0]


def test_a_plan_of_all_blocks_does_not_fit_a_hybrid(lfm2):
    plan = Uniform(pruning_ratio=0.3, scorer=Magnitude()).plan(text_model("Llama"))
    with pytest.raises(PlanError, match="only in the plan: .*language.0.attention"):
        prune(lfm2, plan)


def test_fields_of_what_is_left_whole_are_checked():
    plan = Uniform(pruning_ratio=0.3, scorer=Magnitude()).plan(text_model("Llama"))
    data = json.loads(plan.to_json())
    assert "left_whole" not in data
    with pytest.raises(PlanError, match=r"left_whole\.0\.reason: Field required"):
        PruningPlan.from_json(json.dumps(data | {"left_whole": [{"module": "a", "type": "b"}]}))


def test_a_model_without_a_block_that_can_be_pruned_is_refused_all_the_same():
    model = text_model("Llama")
    for layer in model.model.layers:
        layer.self_attn, layer.mlp = nn.Bilinear(32, 32, 32), nn.Conv1d(32, 32, 1)
    for partial in ("refuse", "report"):
        with pytest.raises(UnsupportedModelError, match=r"\(Bilinear, and 1 more\).*no other blo"):
            find_groups(model, partial=partial)


def test_adapters_are_refused_in_any_case():
    import peft

    config = peft.LoraConfig(r=4, target_modules=["up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(text_model("Llama"), config)
    with pytest.raises(UnsupportedModelError, match=r"^The model carries adapters .*up_proj"):
        find_groups(model, partial="report")


def test_parts_of_a_class_share_a_line():
    parts = [
        LeftWhole(module=f"layers.{i}.mixer", type="Mixer", reason=f"layers.{i}.mixer.norm is wide")
        for i in range(3)
    ]
    other = LeftWhole(module="layers.0.conv", type="Conv", reason="unknown")
    assert left_whole_lines([*parts, other]) == [
        "layers.0.mixer (Mixer, and 2 more): layers.0.mixer.norm is wide",
        "layers.0.conv (Conv): unknown",
    ]


def test_the_commands_say_what_is_left_whole(lfm2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lfm2.save_pretrained("model")
    plan = ("plan", "model", "--allocator", "uniform", "--scorer", "magnitude", "-o", "plan.json")
    plan += ("--pruning-ratio", "0.3", "--device", "cpu")
    with pytest.raises(UnsupportedModelError, match="Lfm2ShortConv"):
        hipp(*plan)
    line = "left whole: model.layers.0.conv (Lfm2ShortConv): no block of a known kind"
    assert line in hipp(*plan, "--partial", "report").splitlines()
    told = hipp("prune", "model", "plan.json", "-o", "small", "--device", "cpu")
    assert line in told  # behind a bar of progress


def test_verification_can_be_switched_off():
    model = text_model("Llama")
    passes: list[int] = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    groups = find_groups(model)
    with without_verification():
        scores = Magnitude()(model)
        plan = plan_from_counts(groups, [1] * len(groups), scores)
        prune(model, plan)
        with sliced(model, groups, scores), masked(model, plan):
            pass
    assert not passes
    Magnitude()(model)
    assert len(passes) == 3
