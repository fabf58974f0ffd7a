"""Plans of the shapes "uniform" and "layers": stock transformers loads what they leave."""

import itertools
import json

import numpy as np
import pytest
import torch
from models import PECULIAR, VARIED, batch, build
from plans import logits, random_scores

from hipp_ext import HiPPPlanner, Preference, masked, prune, save_pruned
from hipp_ext.allocators import GlobalThreshold, Sensitivity
from hipp_ext.allocators.cheapest import expected_losses, task_losses
from hipp_ext.budget import Bounds, Cost, keep_counts, largest_ratio, parameters_left, uniform_plans
from hipp_ext.calibration import Calibration
from hipp_ext.errors import BudgetError
from hipp_ext.groups import find_groups, total_parameters
from hipp_ext.scorers import Magnitude
from hipp_ext.units import plan_from_counts

FAMILIES = [*VARIED, *PECULIAR]


def shaped(family, shape, unit="kv", fraction=0.6):
    """The model of a family, and it pruned by `fraction` of what the shape lets go."""
    model = build(family)
    groups, bounds = find_groups(model, attention_unit=unit), Bounds(shape=shape)
    ratio = fraction * largest_ratio(groups, bounds)
    counts = keep_counts(groups, None, ratio, bounds)
    plan = plan_from_counts(groups, counts, random_scores(groups))
    return model, plan, prune(model, plan)


@pytest.mark.parametrize("shape", ["uniform", "layers"])
@pytest.mark.parametrize(
    ("family", "unit"), [*((f, "kv") for f in FAMILIES), ("llava_gqa", "query"), ("llama", "query")]
)
def test_stock_transformers_loads_what_is_left(family, unit, shape, tmp_path):
    model, plan, small = shaped(family, shape, unit)
    inputs = batch(family)
    with masked(model, plan):
        expected = logits(model, inputs)
    with pytest.warns(UserWarning, match="no processor"):
        save_pruned(small, tmp_path / "small")
    text = json.loads((tmp_path / "small" / "config.json").read_text())
    assert not text.get("text_config", text).get("per_layer_config")
    stock = type(model).from_pretrained(tmp_path / "small").eval()
    left = sum(p.numel() for p in small.parameters())
    assert (
        sum(p.numel() for p in stock.parameters())
        == left
        < sum(p.numel() for p in model.parameters())
    )
    assert torch.equal(logits(stock, inputs), logits(small, inputs))
    assert torch.allclose(logits(stock, inputs), expected, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("shape", ["uniform", "layers", "stock"])
@pytest.mark.parametrize("ratio", [0.2, 0.45])
def test_the_sensitivity_of_a_stock_plan_is_the_least_of_its_shape(shape, ratio):
    """No other plan of the shape that meets the ratio is expected to lose less."""
    model = build("llama", seed=2).double()
    groups, bounds = find_groups(model), Bounds(shape=shape)
    allocator = Sensitivity(pruning_ratio=ratio, bounds=bounds)
    scores = random_scores(groups)
    measured = allocator.measure(model, groups, scores, Calibration.of(model, [batch("llama")]))
    losses = task_losses(measured, 0.5)
    chosen = np.array([allocator.keep_counts(groups, scores, measured)])
    target = parameters_left(total_parameters(groups), ratio)
    others = []
    if shape != "layers":
        others += list(uniform_plans(groups, target, Bounds(shape="uniform")))
    if shape != "uniform":
        for kept in itertools.product([0, 1], repeat=3):
            counts = [g.width * kept[g.layer] for g in groups]
            if any(kept) and Cost.parameters(groups)(counts) <= target:
                others.append(counts)
    least = expected_losses(groups, np.array(others), losses).min()
    assert bounds.allow(groups, chosen)[0]
    assert expected_losses(groups, chosen, losses)[0] == pytest.approx(least)


def test_an_untrained_planner_makes_the_stock_plan_of_sensitivity():
    model, bounds = build("llama", seed=2).double(), Bounds(shape="stock")
    planner = HiPPPlanner(Preference(1, 1, 0), pruning_ratio=0.4, bounds=bounds, cache=None)
    allocator = Sensitivity(pruning_ratio=0.4, bounds=bounds)
    one, other = (m.plan(model, calibration=[batch("llama")]) for m in (planner, allocator))
    assert one.groups == other.groups


def test_one_threshold_over_all_units_has_no_uniform_plan():
    allocator = GlobalThreshold(pruning_ratio=0.3, scorer=Magnitude(), bounds=Bounds(shape="stock"))
    with pytest.raises(BudgetError, match="every layer different"):
        allocator.plan(build("llama"))
