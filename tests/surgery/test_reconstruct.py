"""Compensation: against least squares on the activations themselves, and never worse than slicing
where it looked.
"""

import copy
import warnings

import pytest
import torch
from models import batch, build
from plans import dropping_plan, logits, random_plan
from test_scorers import consumer_inputs, left_padded
from torch import nn

from hipp_ext import PruningPlan, load_pruned, prune, save_pruned
from hipp_ext.errors import CalibrationError, PlanError, UnsupportedModelError
from hipp_ext.groups import find_groups, tower_layers
from hipp_ext.surgery.least_squares import RIDGE, Products, improved
from hipp_ext.surgery.masks import match
from hipp_ext.surgery.reconstruct import reconstructed_weights
from hipp_ext.units import plan_from_counts


def dropping(model: nn.Module, dropped: dict[str, set[int]]) -> PruningPlan:
    """The plan that loses these units and nothing else."""
    groups = find_groups(model)
    scores = {
        g.name: torch.tensor([float(u not in dropped.get(g.name, ())) for u in range(g.width)])
        for g in groups
    }
    return plan_from_counts(
        groups, [g.width - len(dropped.get(g.name, ())) for g in groups], scores
    )


def kept_columns(group, entry) -> list[int]:
    return [u * group.columns + c for u in entry.kept for c in range(group.columns)]


@torch.no_grad()
def stream_before(model: nn.Module, group, inputs: dict) -> torch.Tensor:
    """The residual stream that a group's block reads, (tokens, hidden)."""
    layer, seen = model.get_submodule(group.block.rpartition(".")[0]), []
    names = {
        "attention": ("input_layernorm", "layer_norm1"),
        "ffn": ("post_attention_layernorm", "layer_norm2"),
    }
    norm = next(getattr(layer, n) for n in names[group.place] if hasattr(layer, n))
    hook = norm.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model(**inputs)
    hook.remove()
    return seen[0].flatten(0, 1).double()


@torch.no_grad()
def problem(model: nn.Module, small: nn.Module, group, entry, inputs: dict, drift=0.5) -> tuple:
    """Inputs of the small model's consumer; its outputs if nothing of its block were pruned, and
    half of the drift below made up for; the sliced weight.
    """
    dense = model.get_submodule(group.consumer).weight.double()
    whole = copy.deepcopy(small)
    whole.set_submodule(group.block, model.get_submodule(group.block))
    wanted = consumer_inputs(whole, group, inputs) @ dense.T
    if drift:
        there, here = (stream_before(m, group, inputs) for m in (model, small))
        wanted += drift * (there - here)
    return consumer_inputs(small, group, inputs), wanted, dense[:, kept_columns(group, entry)]


def output_errors(model: nn.Module, small: nn.Module, group, entry, inputs) -> tuple[float, float]:
    """How far the outputs of the small model's consumer are from those wanted: as it is, and with
    its weight only sliced.
    """
    x, wanted, sliced = problem(model, small, group, entry, inputs)
    new = small.get_submodule(group.consumer).weight.detach().double()
    return float((x @ new.T - wanted).norm()), float((x @ sliced.T - wanted).norm())


def check_solution(x, wanted, sliced, actual: torch.Tensor) -> None:
    """The weight is what a solver of least squares finds, and not the slice."""
    pull = (RIDGE * x.square().sum(0).mean()).sqrt()
    left = torch.cat([x, pull * torch.eye(x.shape[1])])
    expected = torch.linalg.lstsq(left, torch.cat([wanted, pull * sliced.T])).solution.T.float()
    assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(actual, sliced.float(), atol=1e-2)


def shrunken(model: nn.Module, plan: PruningPlan) -> list:
    """Groups that lose units and not all of them, with their entries in the plan."""
    pairs = zip(match(model, plan), plan.groups, strict=True)
    return [(g, e) for g, e in pairs if 0 < e.keep < e.width]


@pytest.mark.parametrize("name", ["llava", "llava_gqa", "qwen2_5_vl", "llama"])
def test_weights_solve_the_ridge_problem_on_the_inputs_of_the_pruned_model(name):
    model, inputs = build(name), batch(name, size=3, length=19)
    towers = ("language", "vision") if name == "llava" else ("language",)
    plan = random_plan(model, towers=towers)
    small = prune(model, plan, reconstruct=True, calibration=[inputs])
    for g, entry in shrunken(model, plan):
        actual = small.get_submodule(g.consumer).weight
        check_solution(*problem(model, small, g, entry, inputs), actual)


@pytest.mark.parametrize("name", ["gemma3", "mllama", "granite_llava"])
def test_outputs_that_are_normed_or_scaled_make_up_for_no_drift(name):
    model, inputs = build(name), batch(name, size=3, length=19)
    plan = random_plan(model)
    small = prune(model, plan, reconstruct=True, calibration=[inputs])
    for g, entry in shrunken(model, plan):
        drift = 0.5 if name == "mllama" and g.layer != 1 else 0  # layer 1 has gates
        actual = small.get_submodule(g.consumer).weight
        check_solution(*problem(model, small, g, entry, inputs, drift), actual)


def test_what_a_dropped_block_lacks_reaches_the_layers_above():
    model, inputs = build("qwen2_5_vl"), batch("qwen2_5_vl", size=3, length=19)
    plan = dropping_plan(model, "language.1.attention", half=["language.0.ffn", "language.2.ffn"])
    small = prune(model, plan, reconstruct=True, calibration=[inputs])
    # A pruned model, with a dropped block and widths of its own, can be pruned again.
    again = random_plan(small)
    smaller = prune(small, again, reconstruct=True, calibration=[inputs])
    for before, after, made in ((model, small, plan), (small, smaller, again)):
        for g, entry in shrunken(before, made):
            if g.layer != 1:  # its first norm is gone
                actual = after.get_submodule(g.consumer).weight
                check_solution(*problem(before, after, g, entry, inputs), actual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llava_gqa", "qwen2_5_vl"])
def test_outputs_on_the_calibration_are_nearer_to_the_dense_ones(name, dtype):
    model, inputs = build(name).to(dtype), batch(name, size=3, length=19)
    plan = random_plan(model)
    fixed = prune(model, plan, reconstruct=True, calibration=[inputs])
    assert {p.dtype for p in fixed.parameters()} == {dtype}
    for g, entry in zip(match(model, plan), plan.groups, strict=True):
        if entry.keep < entry.width:
            new, sliced = output_errors(model, fixed, g, entry, inputs)
            assert new < 0.98 * sliced, g.name


def test_a_solution_that_rounding_makes_worse_is_not_taken():
    """What is lost here is smaller than what bfloat16 does to the weights that would make up for
    it.
    """
    model, inputs = build("llama"), batch("llama", size=3, length=19)
    with torch.no_grad():
        for layer in tower_layers(model, "language"):
            layer.mlp.down_proj.weight[:, 1] *= 0.003
    model.to(torch.bfloat16)
    plan = dropping(model, {f"language.{i}.ffn": {1} for i in range(3)})
    fixed = prune(model, plan, reconstruct=True, calibration=[inputs])
    for g, entry in zip(match(model, plan), plan.groups, strict=True):
        new, sliced = output_errors(model, fixed, g, entry, inputs)
        assert new <= 1.001 * sliced, g.name


@pytest.mark.parametrize("name", ["llava", "llava_gqa"])
def test_a_duplicate_can_go_without_a_trace(name):
    model, inputs = build(name), batch(name, size=3, length=19)
    attention, ffn = (
        tower_layers(model, "language")[1].self_attn,
        tower_layers(model, "language")[1].mlp,
    )
    with torch.no_grad():
        for layer, rows in (
            (attention.q_proj, find_groups(model)[2].produced[0].size),
            (attention.k_proj, attention.head_dim),
            (attention.v_proj, attention.head_dim),
            (ffn.gate_proj, 1),
            (ffn.up_proj, 1),
        ):
            layer.weight[rows : 2 * rows] = layer.weight[:rows]
    plan = dropping(model, {"language.1.attention": {1}, "language.1.ffn": {1}})
    dense = logits(model, inputs)
    slicing = (logits(prune(model, plan), inputs) - dense).abs().max()
    groups = match(model, plan)
    small = prune(model, plan)
    for consumer, weight in reconstructed_weights(
        model, groups, plan, [inputs], ridge=1e-7
    ).items():
        small.get_submodule(consumer).weight.data = weight
    assert slicing > 0.1 and torch.allclose(logits(small, inputs), dense, atol=1e-4, rtol=1e-4)


def test_a_plan_that_keeps_everything_changes_nothing():
    model, inputs = build("llava_gqa"), batch("llava_gqa")
    small = prune(model, dropping(model, {}), reconstruct=True, calibration=[inputs])
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in small.state_dict().items())


def test_only_consumers_that_shrink_change():
    model, inputs = build("qwen2_5_vl"), batch("qwen2_5_vl")
    plan = dropping(model, {"language.2.ffn": {3, 11}})
    sliced, fixed = (
        prune(model, plan).state_dict(),
        prune(model, plan, reconstruct=True, calibration=[inputs]).state_dict(),
    )
    changed = [k for k in sliced if not torch.equal(sliced[k], fixed[k])]
    assert changed == ["model.language_model.layers.2.mlp.down_proj.weight"]


def test_a_repair_carries_over_to_other_tokens(monkeypatch):
    """Of fewer tokens than columns, least squares learns the calibration by heart; held-out rows
    tell.
    """
    model, plan = build("llama"), random_plan(build("llama"))
    short, fresh = (
        [batch("llama", size=4, length=2, seed=s) for s in range(2)],
        batch("llama", size=32, length=9, seed=7),
    )
    shrunken = [
        (g, e) for g, e in zip(match(model, plan), plan.groups, strict=True) if e.keep < e.width
    ]

    def beside_slicing(calibration) -> list[float]:
        small = prune(model, plan, reconstruct=True, calibration=calibration)
        errors = [output_errors(model, small, *pair, fresh) for pair in shrunken]
        return [new / sliced for new, sliced in errors]

    with pytest.warns(
        UserWarning,
        match=r"2 of 5 layers are fitted to fewer tokens than they have columns \(24 tokens for 32",
    ):
        assert max(beside_slicing(short)) < 1.05
    monkeypatch.setattr("hipp_ext.surgery.reconstruct.MIN_ROWS", 99)
    with pytest.warns(UserWarning, match="A calibration of 8 rows is too little to hold any out"):
        assert max(beside_slicing(short)) > 1.2


@pytest.mark.parametrize("same", [True, False])
def test_a_repair_that_fails_on_held_out_rows_is_not_kept(same):
    """What is lost was twice a column that stays; on the rows held out it still is, or it is the
    opposite.
    """
    x, weight = torch.randn(50, 43), 0.2 * torch.randn(5, 44)
    fitted, held_out = (Products.none(weight[:, 1:]) for _ in range(2))
    fitted.add(x, 2 * x[:, :1] @ weight[:, :1].T)
    held_out.add(x, (2 if same else -2) * x[:, :1] @ weight[:, :1].T)
    new = improved(weight[:, 1:], fitted, held_out, RIDGE)
    assert (new is not None) == same
    if same:
        assert torch.allclose(new[:, 0], weight[:, 1] + 2 * weight[:, 0], atol=0.05)


def test_with_calibration_enough_every_layer_is_repaired(caplog):
    model, plan = build("llava_gqa"), random_plan(build("llava_gqa"))
    with caplog.at_level("INFO", "hipp_ext.surgery.reconstruct"):
        fixed = prune(
            model,
            plan,
            reconstruct=True,
            calibration=[batch("llava_gqa", size=9, length=30, seed=s) for s in range(4)],
        )
    shrunken = sum(e.keep < e.width for e in plan.groups)
    fresh = batch("llava_gqa", size=8, length=30, seed=9)
    errors = [
        output_errors(model, fixed, g, e, fresh)
        for g, e in zip(match(model, plan), plan.groups, strict=True)
        if e.keep < e.width
    ]
    assert f"{shrunken} of {shrunken} pruned blocks were reconstructed" in caplog.text
    assert all(new < sliced for new, sliced in errors)


def test_padding_does_not_count():
    model, plan = build("llava_gqa"), random_plan(build("llava_gqa"))
    plain = reconstructed_weights(model, match(model, plan), plan, [batch("llava_gqa")])
    padded = reconstructed_weights(model, match(model, plan), plan, [left_padded("llava_gqa")])
    for name in plain:
        assert torch.allclose(plain[name], padded[name], rtol=1e-3, atol=1e-4)


def test_the_vision_tower_is_compensated_too():
    model, inputs = build("llava"), batch("llava", size=3)
    plan = random_plan(model, towers=("language", "vision"))
    dense, sliced = logits(model, inputs), logits(prune(model, plan), inputs)
    name = "model.vision_tower.encoder.layers.0.mlp.fc2"
    fixed = prune(model, plan, reconstruct=True, calibration=[inputs])
    assert (logits(fixed, inputs) - dense).norm() < (sliced - dense).norm()
    assert torch.equal(fixed.get_submodule(name).bias, model.get_submodule(name).bias)


def test_the_dense_model_is_left_as_it_was_and_in_place_agrees():
    model, inputs = build("llava"), batch("llava", labels=True)
    model.train()
    weight = find_groups(model)[1].consumer + ".weight"
    producer = find_groups(model)[1].producers[0] + ".weight"
    model(**inputs).loss.backward()
    model.get_parameter(weight).requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = random_plan(model)
    copied = prune(model, plan, reconstruct=True, calibration=[inputs])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not hasattr(
        model, "hipp_plan"
    )
    assert all(m.training for m in (*model.modules(), *copied.modules()))
    assert not any(m._forward_pre_hooks for m in (*model.modules(), *copied.modules()))
    assert (
        prune(model, plan, inplace=True, reconstruct=True, calibration=[inputs]) is model
        and model.hipp_plan == plan
    )
    assert all(torch.equal(v, copied.state_dict()[k]) for k, v in model.state_dict().items())
    for small in (model, copied):
        assert (
            small.get_parameter(weight).grad is None
            and not small.get_parameter(weight).requires_grad
        )
        assert small.get_parameter(producer).grad.shape == small.get_parameter(producer).shape


def test_it_loads_to_the_bit(tmp_path):
    model, inputs = build("llava_gqa"), batch("llava_gqa")
    small = prune(model, random_plan(model), reconstruct=True, calibration=[inputs])
    loaded = load_pruned(save_pruned(small, tmp_path / "small"))
    assert (
        torch.equal(logits(loaded, inputs), logits(small, inputs))
        and loaded.hipp_plan == small.hipp_plan
    )


def test_without_calibration_nothing_is_changed():
    model = build("llava")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CalibrationError, match="No calibration data: pass calibration="):
        prune(model, random_plan(model), inplace=True, reconstruct=True)
    with pytest.raises(CalibrationError, match="holds no batches"):
        prune(model, random_plan(model), inplace=True, reconstruct=True, calibration=[])
    with pytest.raises(PlanError, match="made for another model"):
        prune(model, random_plan(build("llama")), inplace=True, reconstruct=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not hasattr(
        model, "hipp_plan"
    )


def test_activations_that_are_not_finite_change_nothing():
    model, inputs = build("llava"), batch("llava")
    with torch.no_grad():
        tower_layers(model, "language")[1].mlp.up_proj.weight[0, 0] = float("inf")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        UnsupportedModelError,
        match=r"layers\.1\.mlp\.down_proj are NaN or infinite.*Nothing was changed",
    ):
        prune(model, random_plan(model), inplace=True, reconstruct=True, calibration=[inputs])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not hasattr(
        model, "hipp_plan"
    )


def test_inputs_that_are_all_zero_leave_the_slices():
    model, inputs = build("llava"), batch("llava")
    with torch.no_grad():
        tower_layers(model, "language")[0].mlp.up_proj.weight.zero_()
    plan = dropping(model, {"language.0.ffn": {5}})
    fixed = prune(model, plan, reconstruct=True, calibration=[inputs])
    assert all(
        torch.equal(v, fixed.state_dict()[k]) for k, v in prune(model, plan).state_dict().items()
    )


def test_rows_from_one_template_are_told():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 6000}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    plan = random_plan(model)

    def told(different: int) -> list[str]:
        ids = torch.arange(10 * 80).reshape(10, 80) % different
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            prune(model, plan, reconstruct=True, calibration=[{"input_ids": ids}])
        return [str(w.message) for w in caught if "much alike" in str(w.message)]

    assert "of 800 tokens 40 are different" in told(40)[0]
    assert not told(800)
