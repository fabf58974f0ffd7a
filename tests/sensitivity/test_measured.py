"""Measured divergences, against the logits of a masked model."""

import pytest
import torch
from models import PECULIAR, VARIED, build
from plans import dropping_plan, logits, random_scores
from replays import AsFound, batch_for, padded, points_of, replay_of, rows_of, with_dropout

from hipp_ext import masked, prune
from hipp_ext.groups import find_groups, tower_layers
from hipp_ext.sensitivity import measured as measured_module
from hipp_ext.sensitivity import replay as replay_module
from hipp_ext.sensitivity.measured import Point, measure_points
from hipp_ext.sensitivity.positions import counted_positions
from hipp_ext.units import plan_from_counts

MODELS = [*VARIED, *PECULIAR]


def naive_rows(model, groups, point, scores, given) -> torch.Tensor:
    """(rows,) KL of each row, summed over its counted positions, from whole masked passes."""
    counts = [g.width - (point.removed if g == point.group else 0) for g in groups]
    counted = counted_positions(model, given)
    inputs = {name: value for name, value in given.items() if name != "labels"}
    dense = logits(model, inputs).double().log_softmax(-1)
    with masked(model, plan_from_counts(groups, counts, scores)):
        pruned = logits(model, inputs).double().log_softmax(-1)
    return ((dense.exp() * (dense - pruned)).sum(-1) * counted).sum(1)


def naive(model, points, scores, batches) -> torch.Tensor:
    """(points,) mean KL over the counted positions of all batches."""
    groups = find_groups(model)
    positions = sum(int(counted_positions(model, given).sum()) for given in batches)
    sums = [
        sum(naive_rows(model, groups, point, scores, given).sum() for given in batches)
        for point in points
    ]
    return torch.tensor(sums) / positions


def assert_close(values, expected):
    """As equal as float32 makes a small divergence."""
    torch.testing.assert_close(values.double(), expected.double(), rtol=2e-3, atol=2e-6)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.mark.parametrize("name", MODELS)
def test_points_are_divergences_of_the_masked_model(name):
    """First and last layer, one unit, half of them, and the whole block."""
    model = build(name)
    groups = find_groups(model)
    scores, points = random_scores(groups), points_of([*groups[:2], *groups[-2:]])
    batches = [batch_for(name, labels=True), padded(batch_for(name, size=3, seed=1), 2)]
    replay = replay_of(model, batches)
    expected = naive(model, points, scores, batches)
    found = measure_points(model, replay, points, scores, replay.batches)
    assert (expected > 1e-5).any() and found.shape == (len(points), 2)
    assert_close(found, expected[:, None].expand(-1, 2))


def test_a_layer_that_reads_pictures_is_passed_over_in_text():
    """Mllama does not run it there, so it loses nothing, and the layers above are found."""
    model = build("mllama")
    groups = find_groups(model)
    scores, points = random_scores(groups), points_of(groups)
    batches = [batch_for("llama")]
    replay = replay_of(model, batches)
    found = measure_points(model, replay, points, scores, replay.batches)
    assert_close(found[:, 0], naive(model, points, scores, batches))
    for point, value in zip(points, found[:, 0].tolist(), strict=True):
        assert (value == 0) == (point.group.layer == 1)


def test_a_model_with_dropped_blocks_is_measured():
    dense, blocks = build("llava"), ("language.0.attention", "language.2.ffn")
    model = prune(dense, dropping_plan(dense, *blocks, half=("language.1.ffn",)))
    groups = find_groups(model)
    assert len(groups) == 4
    scores, points, batches = random_scores(groups), points_of(groups), [batch_for("llava")]
    replay = replay_of(model, batches)
    found = measure_points(model, replay, points, scores, replay.batches)
    assert_close(found[:, 0], naive(model, points, scores, batches))


def test_nothing_depends_on_what_is_kept_in_memory(llama, monkeypatch):
    """Dense log probabilities computed again, logits of three positions at a time."""
    groups = find_groups(llama)
    scores, points = random_scores(groups), points_of(groups)
    replay = replay_of(llama, [batch_for("llama")])
    kept = measure_points(llama, replay, points, scores, replay.batches)
    monkeypatch.setattr(replay_module, "CHUNK_BYTES", 3 * 4 * 97)
    chunked = measure_points(llama, replay, points, scores, replay.batches)
    monkeypatch.setattr(measured_module, "DENSE_BYTES", 0)
    calls = []
    head = llama.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    again = measure_points(llama, replay, points[:1], scores, replay.batches)
    handle.remove()
    assert_close(chunked, kept)
    assert_close(again, kept[:1])
    assert calls == [3] * 10 + [1] * 2  # of 16 positions, dense and pruned, and never all at once


def test_layers_below_the_pruned_one_do_not_run():
    model = build("llama")
    groups, layers = find_groups(model), tower_layers(model, "language")
    runs = [0] * len(layers)

    def count(index):
        def hook(*_):
            runs[index] += 1

        return hook

    handles = [layer.mlp.register_forward_hook(count(i)) for i, layer in enumerate(layers)]
    replay = replay_of(model, [batch_for("llama")])
    runs[:] = [0, 0, 0]
    points = [Point(group=g, removed=1) for g in groups]  # two in each layer
    measure_points(model, replay, points, random_scores(groups), replay.batches)
    for handle in handles:
        handle.remove()
    assert runs == [1 + 2, 1 + 4, 1 + 6]


def test_tasks_have_their_own_batches(llama):
    groups = find_groups(llama)
    scores, points = random_scores(groups), points_of(groups[:2])
    one, other = batch_for("llama"), batch_for("llama", size=3, seed=1)
    replay = replay_of(llama, {"utility": [one], "robustness": [one, other]})
    found = measure_points(llama, replay, points, scores, replay.batches)
    assert_close(found[:, 0], naive(llama, points, scores, [one]))
    assert_close(found[:, 1], naive(llama, points, scores, [one, other]))


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2_5_vl"])
def test_some_rows_of_a_batch_are_measured_alone(name):
    """Rows with padding: towers are given a mask of each row, or several of them."""
    model, given = build(name), padded(batch_for("llama", size=4))
    given["attention_mask"][1, 3:5] = 0
    groups = find_groups(model)
    scores, points = random_scores(groups), points_of(groups)
    whole = replay_of(model, [given])
    taken = whole.batches[0].take([1, 3])
    found = measure_points(model, whole, points, scores, [taken])
    assert_close(found[:, 0], naive(model, points, scores, [rows_of(given, [1, 3])]))


def test_the_model_is_left_as_it_was_found():
    replay, state = replay_of(build("llava"), [batch_for("llava")]), AsFound("llava")
    groups = find_groups(state.model)
    points = points_of(groups[-2:])
    measure_points(state.model, replay, points, random_scores(groups), replay.batches)
    state.check()


def test_nothing_is_dropped_out(llama):
    groups = find_groups(llama)
    scores, points = random_scores(groups), points_of(groups)
    replay = replay_of(llama, [batch_for("llama")])
    expected = measure_points(llama, replay, points, scores, replay.batches)
    found = measure_points(with_dropout(), replay, points, scores, replay.batches)
    assert torch.equal(found, expected)


def test_progress_counts_points_and_batches(llama):
    groups = find_groups(llama)
    replay = replay_of(llama, [batch_for("llama"), batch_for("llama", seed=1)])
    ticks = []
    points = [Point(group=g, removed=1) for g in groups[:2]]
    measure_points(
        llama, replay, points, random_scores(groups), replay.batches, lambda *n: ticks.append(n)
    )
    assert ticks == [(1, 4), (2, 4), (3, 4), (4, 4)]
