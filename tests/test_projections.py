"""GPT-2, whose layers keep their weights as (inputs, outputs), gives the same numbers as the same
model of nn.Linear layers, whatever is asked of it.
"""

import copy

import pytest
import torch
from plans import logits, random_plan, random_scores
from torch import nn
from zoo import FAMILIES

from hipp_ext import masked, prune
from hipp_ext.allocators import Sensitivity
from hipp_ext.groups import find_groups, query_groups, reading_weight
from hipp_ext.planner.state import measure_signals
from hipp_ext.projections import as_stored, is_projection, matrix_of, projection
from hipp_ext.scorers import SCORERS
from hipp_ext.surgery.drop import replace_modules
from hipp_ext.surgery.masks import zero_units
from hipp_ext.units import plan_from_counts

GPT2 = FAMILIES["gpt2"]
# These ask for a picture, and for experts.
OTHERS = ("visual", "expert_use")


@pytest.fixture
def model() -> nn.Module:
    return GPT2.build()


def of_linear_layers(model: nn.Module) -> nn.Module:
    """A copy of the model with an nn.Linear in place of every Conv1D."""
    model, layers = copy.deepcopy(model), {}
    for name, layer in model.named_modules():
        if type(layer).__name__ == "Conv1D":
            layers[name] = nn.Linear(layer.nx, layer.nf)
            layers[name].weight.data.copy_(layer.weight.data.T)
            layers[name].bias.data.copy_(layer.bias.data)
    replace_modules(model, layers)
    return model.eval()


def calibration() -> list[dict]:
    batch = GPT2.batch(rows=8, length=9)
    return [batch | {"labels": batch["input_ids"]}]


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(other.detach().abs().max()))


def test_a_matrix_goes_back_to_where_it_was_read(model):
    for twin in (model, of_linear_layers(model)):
        layers = [m for m in twin.transformer.modules() if is_projection(m)]
        assert len(layers) == 8
        for layer in layers:
            assert torch.equal(as_stored(layer, matrix_of(layer)), layer.weight)
            assert len(matrix_of(layer)) == len(layer.bias)


def test_groups_are_the_same(model):
    groups, twins = find_groups(model), find_groups(of_linear_layers(model))
    assert len(groups) == 4
    for one, other in zip(groups, twins, strict=True):
        for name in ("name", "width", "unit_parameters", "unit_flops", "columns", "stock_counts"):
            assert getattr(one, name) == getattr(other, name)
        parts = zip(one.produced, other.produced, strict=True)
        assert [p.start for p, _ in parts] == [p.start for p in other.produced]
        weight = reading_weight(model, one)
        assert weight.shape == (48, one.width * one.columns)


@pytest.mark.parametrize("name", [n for n in SCORERS if n not in OTHERS])
def test_scores_are_the_same(model, name):
    options = {"attack_steps": 2} if name == "mrs" else {}
    scorer, twin = SCORERS[name](**options), of_linear_layers(model)
    scores, expected = scorer(model, calibration()), scorer(twin, calibration())
    for group, values in expected.items():
        assert float(values.std()) > 0 and close(scores[group], values), group


def test_sensitivity_and_signals_are_the_same(model):
    twin, allocator = of_linear_layers(model), Sensitivity(pruning_ratio=0.3)
    one, other = (allocator.plan(m, calibration=calibration()) for m in (model, twin))
    assert one.groups == other.groups
    one, other = (measure_signals(m, calibration()).state for m in (model, twin))
    assert close(one, other)


def test_reconstruction_is_the_same_and_nearer_to_the_dense_model(model):
    """The weights fitted to the twin, laid out the other way round."""
    plan, inputs = random_plan(model, seed=3), GPT2.batch()
    twin = of_linear_layers(model)
    fitted, expected = (
        prune(m, plan, reconstruct=True, calibration=calibration()) for m in (model, twin)
    )
    for group in find_groups(fitted):
        one, other = (matrix_of(projection(m, group.consumer)) for m in (fitted, expected))
        assert close(one, other)
    assert close(logits(fitted, inputs), logits(expected, inputs))
    seen, dense = calibration()[0], logits(model, calibration()[0])
    sliced = logits(prune(model, plan), seen)
    assert (logits(fitted, seen) - dense).norm() < (sliced - dense).norm()


def test_zeros_are_those_of_the_plan(model):
    plan, inputs = random_plan(model, seed=1), GPT2.batch()
    with masked(model, plan):
        expected = logits(model, inputs)
    zero_units(model, plan)
    assert close(logits(model, inputs), expected)


@pytest.mark.parametrize("multi_query", [True, False])
def test_where_keys_are_shared_rows_lie_part_by_part_and_else_head_by_head(multi_query):
    """GPT-BigCode calls its projection as GPT-2 does, and lays it out in one of two ways."""
    torch.manual_seed(0)
    family = FAMILIES["gpt_bigcode"]
    config = family.configuration()
    config.multi_query, config.num_key_value_heads = multi_query, 1 if multi_query else 8
    model, inputs = family.cls(config).eval(), family.batch()
    groups = find_groups(model, attention_unit="query")
    assert [g.width for g in groups] == [8, 44] * 2
    assert groups[0].kind == ("query_heads" if multi_query else "attention")
    assert bool(query_groups(model, ("language",))) == multi_query
    plan = plan_from_counts(groups, [3, 20, 5, 44], random_scores(groups))
    with masked(model, plan):
        expected = logits(model, inputs)
    assert close(logits(prune(model, plan), inputs), expected)
