"""Mixtures of experts by experts and by channels: what units own, how they are masked, scored,
planned, pruned, saved.
"""

import json

import pytest
import torch
from plans import random_scores
from torch import nn
from zoo import FAMILIES

from hipp_ext import PruningPlan, load_pruned, masked, prune, save_pruned
from hipp_ext.allocators import GlobalThreshold, Sensitivity, Uniform
from hipp_ext.budget import Bounds, keep_counts
from hipp_ext.budget.active import size_after, size_of
from hipp_ext.errors import BudgetError, CalibrationError, PlanError, UnsupportedModelError
from hipp_ext.groups import Group, find_groups, reading_weight, watching
from hipp_ext.kinds.mixture import Mixture
from hipp_ext.scorers import FLAP, ExpertUse, Magnitude, Taylor, WandaSP
from hipp_ext.sensitivity.fisher import unit_contributions
from hipp_ext.surgery.masks import zero_units
from hipp_ext.surgery.padding import pad_to_uniform
from hipp_ext.surgery.slices import sliced
from hipp_ext.units import plan_from_counts

# Experts in one piece or transposed and interleaved with biases, groups of them, shared ones,
# inputs scaled by the router; the laws over all families are those of the zoo.
NAMES = ("mixtral", "gpt_oss", "deepseek_v3", "llama4")
UNITS = ("expert", "channel")
MODELS = {name: FAMILIES[name].build() for name in NAMES}
CASES = [(name, unit) for name in NAMES for unit in UNITS]


def batch(name: str, **options) -> dict:
    return FAMILIES[name].batch(**options)


def labelled(name: str) -> dict:
    inputs = batch(name, rows=3)
    return inputs | {"labels": inputs["input_ids"]}


def mixtures(model: nn.Module, unit) -> list[Group]:
    return [g for g in find_groups(model, expert_unit=unit) if g.kind.startswith("expert")]


def uneven(groups, seed: int = 0) -> PruningPlan:
    """Another number of units in every group."""
    counts = [
        g.sections * max(-(-g.least // g.sections), g.width // g.sections * (2 + i % 3) // 5)
        for i, g in enumerate(groups)
    ]
    return plan_from_counts(groups, counts, random_scores(groups, seed))


@torch.no_grad()
def logits(model: nn.Module, inputs: dict) -> torch.Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_owns_its_weights_and_its_entries_of_the_router(name):
    model = MODELS[name]
    for group in mixtures(model, "expert"):
        mixture = Mixture.of(model.get_submodule(group.block))
        assert mixture is not None
        assert group.width == mixture.count and group.least >= mixture.top_k
        router = getattr(mixture.block, mixture.router)
        own = [*mixture.experts.parameters(), *router.parameters()]
        assert group.parameters == sum(p.numel() for p in own)
        assert group.unit_active == sum(p.numel() for p in router.parameters()) // group.width
        corrected = hasattr(router, "e_score_correction_bias")
        assert [part.parameter.rpartition(".")[2] for part in group.buffers] == (
            ["e_score_correction_bias"] * corrected
        )
        assert group.sections == (router.num_group if corrected else 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_channel_is_that_of_all_experts(name):
    model = MODELS[name]
    for group in mixtures(model, "channel"):
        experts = model.get_submodule(f"{group.block}.experts")
        read_alone = getattr(experts, "down_proj_bias", torch.empty(0)).numel()
        assert group.parameters == sum(p.numel() for p in experts.parameters()) - read_alone
        assert (group.least, group.sections, group.multiple(1)) == (1, 1, 8)
        assert group.multiple(12) == 24  # rows of 16 bytes, in half precision


@pytest.mark.parametrize(("name", "unit"), CASES)
def test_the_wide_linear_layer_computes_what_the_experts_do(name, unit):
    model, inputs = MODELS[name], batch(name)
    group = mixtures(model, unit)[0]
    z, outputs = torch.zeros(inputs["input_ids"].numel(), group.width * group.inputs), []

    def look(x, tokens, part) -> None:
        z[:, part] = z[:, part].index_add(0, tokens, x)

    experts = model.get_submodule(f"{group.block}.experts")
    with experts.register_forward_hook(lambda _, __, output: outputs.append(output)):
        expected = logits(model, inputs)
        with watching(model, group, look):
            assert torch.allclose(logits(model, inputs), expected, atol=1e-4)
    dense, written_out = (o.view(-1, len(z), o.shape[-1]).sum(0) for o in outputs)
    assert torch.allclose(written_out, dense, atol=1e-5)
    if not (name == "gpt_oss" and unit == "channel"):  # whose biases belong to no channel
        assert torch.allclose(z @ reading_weight(model, group).T, dense, atol=1e-5)


@pytest.mark.parametrize(("name", "unit"), CASES)
def test_pruned_equals_masked_sliced_saved_and_padded(name, unit, tmp_path):
    model, inputs = MODELS[name], batch(name)
    groups = find_groups(model, expert_unit=unit)
    plan = uneven(groups)
    with masked(model, plan):
        expected = logits(model, inputs)
    assert not torch.allclose(logits(model, inputs), expected, atol=1e-2)
    small = prune(model, PruningPlan.from_json(plan.to_json()))
    assert torch.allclose(logits(small, inputs), expected, atol=1e-4)
    removed = sum((e.width - e.keep) * e.unit_parameters for e in plan.groups)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    assert sizes[0] - sizes[1] == removed
    with sliced(model, groups, random_scores(groups)) as shrink:
        shrink([e.keep for e in plan.groups])
        assert torch.allclose(logits(model, inputs), expected, atol=1e-4)
    save_pruned(small, tmp_path / "small")
    loaded = load_pruned(tmp_path / "small")
    assert torch.equal(logits(loaded, inputs), logits(small, inputs)) and loaded.hipp_plan == plan
    if unit == "channel":
        pad_to_uniform(small).save_pretrained(tmp_path / "wide")
        stock = type(model).from_pretrained(tmp_path / "wide")
        assert torch.allclose(logits(stock, inputs), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_dropped_mixture_adds_nothing(name, tmp_path):
    model, inputs = MODELS[name], batch(name)
    groups = find_groups(model)
    counts = [0 if g.kind == "experts" else g.width for g in groups]
    plan = plan_from_counts(groups, counts, random_scores(groups))
    with masked(model, plan):
        expected = logits(model, inputs)
    small = prune(model, plan)
    assert torch.allclose(logits(small, inputs), expected, atol=1e-5)
    assert not [n for n, _ in small.named_parameters() if "experts" in n]
    save_pruned(small, tmp_path / "small")
    assert torch.equal(logits(load_pruned(tmp_path / "small"), inputs), logits(small, inputs))


def test_a_layer_leaves_a_model_whose_first_layers_are_dense(tmp_path):
    model, inputs = MODELS["deepseek_v3"], batch("deepseek_v3")
    groups = find_groups(model)
    plan = plan_from_counts(groups, [g.layer and g.width for g in groups], random_scores(groups))
    with masked(model, plan):
        expected = logits(model, inputs)
    small = prune(model, plan)
    assert len(small.model.layers) == 1 and small.config.first_k_dense_replace == 0
    small.save_pretrained(tmp_path)
    assert torch.allclose(
        logits(type(model).from_pretrained(tmp_path), inputs), expected, atol=1e-5
    )


def test_too_few_experts_are_refused():
    model = MODELS["mixtral"]
    groups = find_groups(model)
    counts = [1 if g.kind == "experts" else g.width for g in groups]
    with pytest.raises(PlanError, match=r"0\.experts cannot keep 1 of 8 units: it needs 2 or none"):
        plan_from_counts(groups, counts, random_scores(groups))
    text = uneven(groups).to_json()
    kept = json.loads(text)["groups"][1]
    edited = text.replace(
        f'"keep": {kept["keep"]}, "kept": "{kept["kept"]}"', '"keep": 1, "kept": "0"', 1
    )
    edited = json.loads(edited)
    edited["pruning_ratio"] = 1 - sum(
        g["keep"] * g["unit_parameters"] for g in edited["groups"]
    ) / sum(g["width"] * g["unit_parameters"] for g in edited["groups"])
    with pytest.raises(PlanError, match=r"keeps 1 of 8 experts, and needs 2 or none"):
        prune(model, PruningPlan.from_json(json.dumps(edited)))


def test_bounds_keep_as_many_experts_as_tokens_are_sent_to():
    groups = find_groups(MODELS["deepseek_v3"])
    counts = keep_counts(groups, None, 0.6, Bounds(min_keep=0.0))
    assert all(k >= g.least and not k % g.sections for g, k in zip(groups, counts, strict=True))
    with pytest.raises(BudgetError, match=r"Least keep counts"):
        keep_counts(groups, None, 0.99, Bounds(min_keep=0.0))


def test_experts_cannot_be_padded_nor_set_to_zero():
    model = MODELS["mixtral"]
    plan = uneven(find_groups(model))
    with pytest.raises(
        UnsupportedModelError, match=r"layers have \[\d, \d\] experts, and a router"
    ):
        pad_to_uniform(prune(model, plan))
    with pytest.raises(UnsupportedModelError, match=r"experts cannot be set to zero"):
        zero_units(model, plan)


def test_an_unknown_unit_is_refused():
    with pytest.raises(BudgetError, match="expert_unit='row': one of expert, channel is needed"):
        Uniform(pruning_ratio=0.3, expert_unit="row")  # type: ignore[arg-type]


# Scores


@pytest.mark.parametrize(("name", "unit"), CASES)
def test_scores_are_those_of_the_wide_linear_layer(name, unit):
    model, inputs = MODELS[name], labelled(name)
    groups = find_groups(model, expert_unit=unit)
    group = mixtures(model, unit)[0]
    z = torch.zeros(inputs["input_ids"].numel(), group.width * group.inputs)

    def look(x, tokens, part) -> None:
        z[:, part] = z[:, part].index_add(0, tokens, x)

    with watching(model, group, look):
        logits(model, inputs)
    weight = reading_weight(model, group).detach()
    wanda = (weight.abs() * z.norm(dim=0)).mean(0).view(group.width, -1).sum(1)
    flap = (z.var(0, unbiased=False) * weight.square().sum(0)).view(group.width, -1).mean(1)
    for scorer, expected in ((WandaSP(), wanda), (FLAP(), flap)):
        scores = scorer(model, [inputs], groups=groups)[group.name]
        assert torch.allclose(scores, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "llama4"])
def test_taylor_is_the_derivative_of_a_gate_on_the_weights_that_read_a_unit(name):
    model, inputs = MODELS[name], labelled(name)
    for unit in UNITS:
        group = mixtures(model, unit)[0]
        down = model.get_parameter(group.owns[-1].parameter)
        (gradient,) = torch.autograd.grad(model(**inputs).loss, [down])
        dim = group.owns[-1].dim
        expected = (down * gradient).movedim(dim, 0).flatten(1).sum(1).abs()
        scores = Taylor()(model, [inputs], groups=[group])[group.name]
        assert torch.allclose(scores, expected, rtol=1e-2, atol=1e-6)


def test_magnitude_is_the_norm_of_all_that_an_expert_owns():
    model = MODELS["mixtral"]
    group = mixtures(model, "expert")[0]
    owned = [model.get_parameter(part.parameter).flatten(1) for part in group.owns]
    scores = Magnitude()(model, groups=[group])[group.name]
    assert torch.allclose(scores, torch.cat([o.flatten(1) for o in owned], 1).norm(dim=1))


def test_expert_use_is_the_mean_norm_of_what_an_expert_adds():
    model, inputs = MODELS["mixtral"], batch("mixtral", rows=3)
    inputs["attention_mask"][0, :2] = 0
    groups = find_groups(model)
    group, seen = mixtures(model, "expert")[0], []
    block = model.get_submodule(group.block)
    with block.experts.register_forward_pre_hook(lambda _, args: seen.append(args)):
        logits(model, inputs)
    hidden, index, weights = seen[0]
    valid = inputs["attention_mask"].flatten().bool()
    use = ExpertUse()(model, [inputs], groups=groups)
    often = ExpertUse(form="frequency")(model, [inputs], groups=[group])
    for expert in range(group.width):
        token, place = ((index == expert) & valid[:, None]).nonzero(as_tuple=True)
        gate, up = (hidden[token] @ block.experts.gate_up_proj[expert].T).chunk(2, -1)
        out = (block.experts.act_fn(gate) * up) @ block.experts.down_proj[expert].T
        norms = (weights[token, place] * out.norm(dim=1)).detach()
        assert float(use[group.name][expert]) == pytest.approx(
            float(norms.sum()) / max(1, len(token))
        )
        assert float(often[group.name][expert]) == pytest.approx(len(token) / int(valid.sum()))
    assert torch.equal(
        use["language.0.attention"], WandaSP()(model, [inputs])["language.0.attention"]
    )
    with pytest.raises(CalibrationError, match="forms strength, frequency; got 'often'"):
        ExpertUse(form="often")


def test_fisher_contributions_of_experts_and_of_their_channels_have_one_sum():
    from sensitivity.replays import replay_of

    model = MODELS["mixtral"]
    replay = replay_of(model, [labelled("mixtral")])
    of_experts, of_channels = (
        unit_contributions(model, replay, find_groups(model, expert_unit=unit)) for unit in UNITS
    )
    for layer in (0, 1):
        experts = of_experts[f"language.{layer}.experts"]
        channels = of_channels[f"language.{layer}.expert_channels"]
        assert experts.shape == (3, 8) and channels.abs().sum() > 0
        assert torch.allclose(experts.sum(1), channels.sum(1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("unit", UNITS)
def test_mixtures_are_planned_by_sensitivity_and_by_threshold(unit):
    model, inputs = MODELS["mixtral"], labelled("mixtral")
    for kind, options in ((Sensitivity, {"effort": "measured"}), (GlobalThreshold, {})):
        plan = kind(pruning_ratio=0.3, expert_unit=unit, **options).plan(
            model, calibration=[inputs]
        )
        assert plan.expert_unit == unit and 0.3 <= plan.pruning_ratio < 0.45
        prune(model, plan)


# Sizes


def test_active_parameters_are_told_apart_from_all():
    model = MODELS["mixtral"]
    dense = size_of(model)
    experts = model.model.layers[0].mlp.experts
    each = sum(p.numel() for p in experts.parameters()) // 8
    assert dense.parameters == sum(p.numel() for p in model.parameters())
    assert dense.active == dense.parameters - 2 * 6 * each
    for unit in UNITS:
        groups = find_groups(model, expert_unit=unit)
        plan = uneven(groups)
        expected, found = size_of(prune(model, plan)), size_after(model, groups, plan)
        assert found == expected
    counts = [0 if g.kind == "experts" else g.width for g in find_groups(model)]
    plan = plan_from_counts(find_groups(model), counts, random_scores(find_groups(model)))
    assert size_after(model, find_groups(model), plan).active < dense.active
