"""Sensitivity of all groups at all levels, by each effort."""

import inspect
from typing import get_args

import pytest
import torch
from models import build
from plans import random_scores
from replays import AsFound, batch_for, replay_of, with_dropout

from hipp_ext.errors import BudgetError, PlanError
from hipp_ext.groups import find_groups, tower_layers
from hipp_ext.sensitivity.curves import LEVELS
from hipp_ext.sensitivity.efforts import Effort, check_effort, measure_sensitivity
from hipp_ext.sensitivity.measured import Point, measure_points

EFFORTS = get_args(Effort)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def measure(model, batches, **options):
    groups = find_groups(model)
    return measure_sensitivity(model, batches, groups, random_scores(groups), **options)


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "mllama"])
def test_losses_by_task_group_and_level(name, effort):
    model = build(name)
    groups, batches = find_groups(model), [batch_for(name), batch_for(name, seed=1)]
    losses = measure(model, batches, effort=effort)
    assert losses.shape == (2, len(groups), len(LEVELS)) and losses.dtype == torch.float32
    assert torch.isfinite(losses).all() and (losses >= 0).all()
    assert torch.equal(losses[0], losses[1])  # the tasks have the same batches
    wide = [i for i, g in enumerate(groups) if g.kind == "ffn"]
    assert (losses[:, wide] > 0).all()
    growing = {"fisher": 1.0, "anchored": 0.5, "measured": 0.125}  # beyond, measurements may fall
    last = LEVELS.index(growing[effort]) + 1
    assert (losses[:, wide, :last].diff() > 0).all()


def test_dropped_blocks_have_their_measured_loss(llama):
    """By "measured" on all rows, and by "anchored" where its passes are enough for them."""
    batches, groups = [batch_for("llama", size=4)], find_groups(llama)
    scores, replay = random_scores(groups), replay_of(llama, batches)
    points = [Point(group=g, removed=g.width) for g in groups]
    expected = measure_points(llama, replay, points, scores, replay.batches)
    found = measure(llama, batches, effort="measured")
    torch.testing.assert_close(found[:, :, -1], expected.T, rtol=1e-4, atol=1e-6)
    some = groups[-1:]
    anchored = measure_sensitivity(llama, batches, some, scores, effort="anchored")
    torch.testing.assert_close(anchored[:, :, -1], expected.T[:, -1:], rtol=1e-4, atol=1e-6)


def test_the_lowest_scores_go_first():
    """Half of a group costs little where it is what nothing reads, and else much."""
    model = build("llama")
    group = find_groups(model)[-1]
    weight = model.get_submodule(group.consumer).weight
    weight.data[:, ::2] = 0
    useless = torch.arange(group.width) % 2 == 0
    for effort in EFFORTS:
        cheap, dear = (
            measure_sensitivity(model, [batch_for("llama")], [group], scores, effort=effort)
            for scores in ({group.name: -useless.float()}, {group.name: useless.float()})
        )
        half = LEVELS.index(0.5)
        assert (cheap[0, 0, :half] * 100 < dear[0, 0, :half]).all(), effort


@pytest.mark.parametrize("effort", EFFORTS)
def test_the_same_seed_gives_the_same_losses(llama, effort):
    batches = [batch_for("llama", size=3)]
    first, again = (measure(llama, batches, effort=effort, seed=3) for _ in range(2))
    assert torch.equal(first, again)
    if effort != "measured":  # whose points come without the estimate
        assert not torch.equal(first, measure(llama, batches, effort=effort, seed=4))


@pytest.mark.parametrize("effort", EFFORTS)
def test_tasks_are_measured_on_their_own_batches(llama, effort):
    mine, theirs, others = (batch_for("llama", size=3, seed=seed) for seed in range(3))
    one = measure(llama, {"utility": [mine], "robustness": [theirs]}, effort=effort)
    other = measure(llama, {"utility": [mine], "robustness": [others]}, effort=effort)
    alone = measure(llama, [mine], effort=effort)
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(one[0], alone[0], rtol=1e-4, atol=1e-7)
    assert not torch.allclose(one[1], other[1], rtol=0.01)
    assert not torch.allclose(one[0], one[1], rtol=0.01)


@pytest.mark.parametrize(("effort", "most"), [("fisher", 3), ("anchored", 10), ("measured", 20)])
def test_efforts_cost_the_passes_they_name(effort, most):
    """In passes of all tokens through all layers, a backward pass counted as one; those of
    `verify_groups`, which is done once, are left out.
    """
    model = build("llama")
    batches = [batch_for("llama", size=4, seed=i) for i in range(4)]
    layers = tower_layers(model, "language")
    measure(model, batches[:1], effort="fisher")
    tokens = []
    handles = [
        handle
        for layer in layers
        for handle in (
            layer.mlp.register_forward_hook(lambda _, args, __: tokens.append(args[0].numel())),
            layer.mlp.register_full_backward_hook(lambda _, __, out: tokens.append(out[0].numel())),
        )
    ]
    measure(model, batches, effort=effort)
    for handle in handles:
        handle.remove()
    whole = sum(b["input_ids"].numel() for b in batches) * model.config.hidden_size * len(layers)
    passes = sum(tokens) / whole
    assert passes <= most
    assert passes > {"fisher": 2, "anchored": 8, "measured": 15}[effort]


@pytest.mark.parametrize("effort", EFFORTS)
def test_the_model_is_left_as_it_was_found(effort):
    state = AsFound("llava")
    measure(state.model, [batch_for("llava")], effort=effort)
    state.check()


@pytest.mark.parametrize("effort", EFFORTS)
def test_nothing_is_dropped_out(llama, effort):
    batches = [batch_for("llama")]
    expected = measure(llama, batches, effort=effort)
    assert torch.equal(measure(with_dropout(), batches, effort=effort), expected)


def test_efforts_are_those_of_the_type():
    for effort in EFFORTS:
        check_effort(effort)
    with pytest.raises(BudgetError, match="effort='half': one of fisher, anchored, measured is"):
        check_effort("half")
    with pytest.raises(BudgetError, match=r"effort=\['fisher'\]"):
        check_effort(["fisher"])
    unchecked = inspect.unwrap(measure_sensitivity)  # types are checked in tests only
    with pytest.raises(BudgetError, match="effort='half'"):
        unchecked(build("llama"), [], [], {}, effort="half")


def test_groups_without_scores_are_refused(llama):
    with pytest.raises(PlanError, match="No scores for language.0.attention"):
        measure_sensitivity(llama, [batch_for("llama")], find_groups(llama), {})


def test_progress_is_shown_on_request(llama, capsys, monkeypatch):
    monkeypatch.setattr("hipp_ext.progress.FIRST", 0.0)
    monkeypatch.setattr("hipp_ext.progress.EVERY", 0.0)
    batches = [batch_for("llama"), batch_for("llama", seed=1)]
    measure(llama, batches)
    assert capsys.readouterr().err == ""
    measure(llama, batches, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("hipp: sensitivity by a backward pass, batch 1 of 2, about")
    # Half of the units on a row of each batch, all of them on a single row.
    expected = [f" point {n} of {total}" for total in (12, 6) for n in range(1, total)]
    assert [line.split(",")[1] for line in lines[1:]] == expected
