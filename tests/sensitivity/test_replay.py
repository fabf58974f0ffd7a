"""The calibration as the language tower sees it, and towers that start at any layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import IMAGE_TOKEN, batch, build
from plans import logits
from replays import batch_for, padded, replay_of, rows_of, with_dropout

from hipp_ext.calibration import Calibration
from hipp_ext.errors import UnsupportedModelError
from hipp_ext.groups import decoder, find_groups, tower_layers
from hipp_ext.replay import Passed, decoder_inputs, starting_at
from hipp_ext.sensitivity.anchors import MEASURED_LEVELS, affordable, points_at


def sizes(batches) -> list[int]:
    return [batch.size for batch in batches]


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def batches_of(*rows, seed=0):
    """Batches of text with so many rows."""
    return [batch_for("llama", size=n, seed=seed + i) for i, n in enumerate(rows)]


# --- inputs of the tower, and its layers


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llama", "gemma3", "mllama"])
def test_the_tower_continues_from_any_layer(name):
    """With its layers below replaced it puts out the same, and afterwards they are there again."""
    model, given = build(name), padded(batch_for(name))
    inputs, layers = decoder_inputs(model, given), list(tower_layers(model, "language"))
    outputs, runs = [], []
    handles = [x.register_forward_hook(lambda _, __, out: outputs.append(out)) for x in layers]
    dense = decoder(model)(**inputs).last_hidden_state
    for handle in handles:
        handle.remove()
    counting = layers[0].mlp.register_forward_hook(lambda *_: runs.append(0))
    for start in range(1, len(layers)):
        before = outputs[start - 1].clone()
        with starting_at(layers, start, Passed.of({}, outputs[start - 1])):
            again = decoder(model)(**inputs).last_hidden_state
        torch.testing.assert_close(again, dense)
        assert torch.equal(outputs[start - 1], before)
    assert not runs
    counting.remove()
    with starting_at(layers, 0, None):
        torch.testing.assert_close(decoder(model)(**inputs).last_hidden_state, dense)
    assert not any("forward" in vars(layer) for layer in layers)


def test_a_forward_of_the_instance_comes_back_after_an_error(llama):
    """accelerate's hooks replace `forward` on the instance, too."""
    model = build("llama")
    layers = list(tower_layers(model, "language"))
    layers[0].forward = own = layers[0].forward
    with pytest.raises(RuntimeError, match="inside"), starting_at(layers, 2, None):
        assert layers[0].forward is not own
        raise RuntimeError("inside")
    assert vars(layers[0])["forward"] is own and "forward" not in vars(layers[1])


def test_the_layers_of_the_tower_do_not_run_for_its_inputs(llama):
    model, runs = build("llava"), []
    tower_layers(model, "language")[0].register_forward_pre_hook(lambda *_: runs.append(0))
    inputs = decoder_inputs(model, batch_for("llava"))
    assert inputs["inputs_embeds"].shape == (2, 24, 40) and not runs
    assert not decoder(model)._forward_pre_hooks


# --- batches and their rows


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llama", "gemma3"])
def test_rows_of_a_batch_are_a_batch_of_those_rows(name):
    model, given = build(name), padded(batch_for(name, size=4, labels=True))
    given["labels"][1, :7] = -100
    given["attention_mask"][3, -4:-2] = 0
    if name == "qwen2_5_vl":  # has positions in three dimensions then, by row
        given["mm_token_type_ids"] = (given["input_ids"] == IMAGE_TOKEN).int()
    (whole,) = replay_of(model, [given]).batches
    assert whole.divisible
    assert (whole.inputs["position_ids"] is not None) == (name == "qwen2_5_vl")
    rows = torch.tensor([1, 3])
    part = whole.take(rows.tolist())
    hidden = decoder(model)(**whole.inputs).last_hidden_state
    alone = decoder(model)(**part.inputs).last_hidden_state
    torch.testing.assert_close(alone, hidden[rows], rtol=1e-4, atol=1e-5)
    places = [whole.places[whole.rows == row].tolist() for row in rows]
    assert [part.places[part.rows == row].tolist() for row in range(2)] == places
    assert part.size == 2 and part.row_keys == (whole.row_keys[1], whole.row_keys[3])
    ones = torch.ones(len(part.rows))
    assert part.per_row(ones).tolist() == [len(own) for own in places]
    assert part.counted(alone).shape == (sum(map(len, places)), alone.shape[-1])


def test_a_batch_with_inputs_of_unknown_shape_is_not_divided():
    """Features of pictures that a layer of Mllama reads."""
    model = build("mllama")
    (batch,) = replay_of(model, [batch_for("mllama")]).batches
    assert not batch.divisible


def test_keys_of_rows_do_not_depend_on_padding(llama):
    given = batch_for("llama", size=2)
    plain, more = (replay_of(llama, [g]).batches[0].row_keys for g in (given, padded(given)))
    assert plain == more and plain[0] != plain[1]
    assert replay_of(llama, [rows_of(given, [1])]).batches[0].row_keys == plain[1:]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.floats(0.01, 1))
def test_a_fraction_of_the_rows(llama, given_sizes, fraction):
    rows = sizes(replay_of(llama, batches_of(*given_sizes)).sample(fraction))
    assert sum(rows) == max(1, int(fraction * sum(given_sizes))) and min(rows) >= 1


def test_rows_are_taken_of_each_task(llama):
    """Few rows of one task, and many of the other; rows of a task run together."""
    few, many = batches_of(2), batches_of(8, 8, 8, 8, seed=1)
    replay = replay_of(llama, {"utility": few, "robustness": many})
    rows = replay.sample(0.25)
    assert [(b.size, b.tasks.tolist()) for b in rows] == [(1, [True, False]), (8, [False, True])]
    assert rows[1].row_keys == tuple(k for b in replay.batches[1:] for k in b.row_keys[::4])


def test_rows_of_unlike_batches_stay_apart(llama):
    """Rows of other lengths, or more of them than any batch had."""
    one, other, long = *batches_of(4, 4), batch("llama", size=4, length=11)
    replay = replay_of(llama, [one, long, other])
    assert sizes(replay.sample(0.5)) == [2, 2, 2]
    assert sizes(replay_of(llama, [one, other, long]).sample(0.5)) == [4, 2]
    assert sizes(replay_of(llama, [one, other]).sample(1.0)) == [4, 4]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_5_vl", "gemma3"])
def test_joined_rows_measure_as_they_did_apart(family):
    model = build(family)
    batches = [batch(family, size=2, seed=seed) for seed in range(2)]
    replay = replay_of(model, batches)
    (joined,) = replay.sample(0.5)
    apart = [b.take([0]) for b in replay.batches]
    hidden = decoder(model)(**joined.inputs).last_hidden_state
    for row, single in enumerate(apart):
        alone = decoder(model)(**single.inputs).last_hidden_state
        torch.testing.assert_close(hidden[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_means_are_over_the_positions_of_each_task(llama):
    one, other = batches_of(2, 3)
    shared = Calibration(by_task={"utility": (one, other), "robustness": (other,)})
    replay = replay_of(llama, shared)
    values = torch.arange(5.0)[:, None] * torch.tensor([1.0, 10.0])
    positions = one["input_ids"].shape[1]
    expected = torch.tensor([10.0 / (5 * positions), 9.0 / (3 * positions)])
    found = replay.by_task(values)
    torch.testing.assert_close(found, expected[:, None] * torch.tensor([1.0, 10.0]))
    torch.testing.assert_close(replay.by_task(values[2:], replay.batches[1:2])[1], found[1])


@pytest.mark.parametrize("batches", [(64,), (32, 31, 1), (1,) * 64])
def test_points_cost_no_more_passes_than_they_may(llama, batches):
    """Whatever the sizes of the batches: of rows, the fraction that passes allow."""
    replay, layers, passes = replay_of(llama, batches_of(*batches)), 3, 6.0
    points = points_at(find_groups(llama), MEASURED_LEVELS)
    each = 1 + sum((layers - p.group.layer) / layers for p in points)
    rows = sum(sizes(replay.sample(affordable(points, layers, passes))))
    assert each > passes and passes - each / 64 < rows / 64 * each <= passes
    assert sum(sizes(replay.sample(affordable(points[:2], layers, passes)))) == 64


def test_of_batches_that_cannot_be_divided_some_are_taken():
    model = build("mllama")
    replay = replay_of(model, [batch_for("mllama", seed=i) for i in range(6)])
    chosen = replay.sample(0.4)
    assert len(chosen) == 2 and set(chosen) <= set(replay.batches)


def test_points_are_those_nearest_to_the_levels_once_each(llama):
    groups = find_groups(llama)[:2]
    assert [(p.group.width, p.removed) for p in points_at(groups, (0.1, 0.25, 0.5, 1.0))] == [
        *((3, k) for k in (1, 2, 3)),
        *((44, k) for k in (4, 11, 22, 44)),
    ]


# --- models that cannot be replayed


def test_a_tower_that_answers_otherwise_the_second_time_is_refused():
    """Dropout, for one."""
    model, given = with_dropout(), batch_for("llama")
    assert not torch.equal(logits(model, given), logits(model, given))
    with pytest.raises(UnsupportedModelError, match="called again with the same inputs"):
        replay_of(model, [given])


def test_offloaded_weights_are_refused():
    model = build("llama")
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(UnsupportedModelError, match="is not in memory"):
        replay_of(model, [batch_for("llama")])
