"""Layers that attend to the keys and values of earlier ones, and values that are the keys."""

import numpy as np
import pytest
import torch
from models import SHARED_KEYS, batch, build
from plans import logits, random_scores

from hipp_ext import load_pruned, masked, prune, save_pruned
from hipp_ext.budget import Bounds, keep_counts
from hipp_ext.calibration import Calibration
from hipp_ext.errors import PlanError, UnsupportedModelError
from hipp_ext.groups import find_groups
from hipp_ext.kinds import shares_with_layers
from hipp_ext.sensitivity.fisher import unit_contributions
from hipp_ext.sensitivity.replay import CalibrationReplay
from hipp_ext.surgery.checkpoint import pad_to_uniform
from hipp_ext.surgery.slices import sliced
from hipp_ext.units import plan_from_counts

NAMES = sorted(SHARED_KEYS)
SHARING = ["gemma3n", "gemma4"]


def planned(name, counts_of=lambda g: g.width - g.sections):
    model = build(name)
    groups = find_groups(model)
    scores = random_scores(groups)
    counts = [counts_of(g) or g.sections for g in groups]
    return model, groups, scores, counts, plan_from_counts(groups, counts, scores)


@pytest.mark.parametrize("name", NAMES)
def test_pruned_is_masked_is_sliced_is_loaded(name, tmp_path):
    model, groups, scores, counts, plan = planned(name)
    inputs = batch(name)
    with masked(model, plan):
        expected = logits(model, inputs)
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    close = dict(rtol=0, atol=1e-4 * float(expected.abs().max()))
    with sliced(model, groups, scores) as shrink:
        shrink(counts)
        torch.testing.assert_close(logits(model, inputs), expected, **close)
    small = prune(model, plan)
    torch.testing.assert_close(logits(small, inputs), expected, **close)
    assert torch.equal(small.generate(**inputs, max_new_tokens=6, do_sample=False), tokens)
    with pytest.warns(UserWarning, match="no processor"):
        save_pruned(small, tmp_path / "small")
    loaded = load_pruned(tmp_path / "small")
    assert torch.equal(logits(loaded, inputs), logits(small, inputs))
    assert loaded.hipp_plan.groups == plan.groups


@pytest.mark.parametrize("name", SHARING)
def test_layers_that_share_keys_lose_query_heads_and_no_others(name):
    model = build(name)
    for group in find_groups(model):
        if group.place == "attention":
            block = model.get_submodule(group.block)
            assert group.kind == "query_heads" and shares_with_layers(block)
            assert (group.width, group.sections) == (4, 2)
            assert group.droppable == block.is_kv_shared_layer


@pytest.mark.parametrize("name", SHARING)
def test_a_block_whose_keys_are_needed_is_not_dropped(name):
    model, groups, scores, *_ = planned(name)
    first = groups[0].name
    counts = [0 if g.name == first else g.width for g in groups]
    with pytest.raises(PlanError, match=f"drops {first}, without which .* later layers attend"):
        prune(model, plan_from_counts(groups, counts, scores))
    needed = np.array([not g.droppable for g in groups])
    for drop in ("blocks", "layers"):
        bounds = Bounds(drop=drop)
        smallest = bounds.smallest(groups)
        assert (smallest[needed] > 0).all() and (smallest[~needed] == 0).any()
        assert bounds.allow(groups, smallest[None])[0]
    counts = keep_counts(groups, None, 0.8, Bounds(drop="blocks"))
    assert all(count for count, needs in zip(counts, needed, strict=True) if needs)


@pytest.mark.parametrize("name", SHARING)
def test_a_block_that_borrows_keys_can_be_dropped(name, tmp_path):
    model, groups, scores, *_ = planned(name)
    counts = [0 if g.layer == 2 and g.place == "attention" else g.width for g in groups]
    small = prune(model, plan := plan_from_counts(groups, counts, scores))
    inputs = batch(name)
    with masked(model, plan):
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(small.generate(**inputs, max_new_tokens=6, do_sample=False), tokens)
    with pytest.warns(UserWarning, match="no processor"):
        save_pruned(small, tmp_path / "small")
    loaded = load_pruned(tmp_path / "small")
    assert torch.equal(logits(loaded, inputs), logits(small, inputs))


@pytest.mark.parametrize("name", SHARING)
def test_activations_are_kept_where_layers_cannot_be_computed_again(name):
    model = build(name)
    replay = CalibrationReplay(model, Calibration.of(model, [batch(name, labels=True)]))
    found = unit_contributions(model, replay, find_groups(model))
    again = unit_contributions(model, replay, find_groups(model), memory_limit=0)
    assert all(torch.equal(again[name], values) for name, values in found.items())


@pytest.mark.parametrize("name", ["gemma4", "gemma4_equal"])
def test_layers_that_differ_to_begin_with_are_not_padded(name):
    model, *_, plan = planned(name)
    with pytest.raises(UnsupportedModelError, match="its layers differ before they are pruned"):
        pad_to_uniform(prune(model, plan))
