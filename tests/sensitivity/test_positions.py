"""Which positions count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import IMAGE_TOKEN, batch, build
from replays import padded

from hipp_ext.calibration import Calibration
from hipp_ext.sensitivity.positions import counted_positions, positions_digest


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.fixture(scope="module")
def llava():
    return build("llava")


def places(counted) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in counted]


def test_the_positions_before_labels_count(llama):
    given = batch("llama", size=2, length=7)
    labels = torch.full_like(given["input_ids"], -100)
    labels[0, 3:5] = 11
    labels[1, 7] = 11
    assert places(counted_positions(llama, given | {"labels": labels})) == [[2, 3], [6]]


def test_of_a_row_without_labels_the_last_token_counts(llama):
    """A label of the first token has no position before it."""
    given = batch("llama", size=3, length=7)
    given["attention_mask"][1, 6:] = 0
    labels = torch.full_like(given["input_ids"], -100)
    labels[0, 5], labels[2, 0] = 11, 11
    assert places(counted_positions(llama, given | {"labels": labels})) == [[4], [5], [7]]


def test_without_labels_the_text_after_the_last_picture_counts(llava):
    given = batch("llava", size=2, length=7)
    given["input_ids"][1, 20] = IMAGE_TOKEN
    assert places(counted_positions(llava, given)) == [[*range(17, 24)], [21, 22, 23]]


def test_of_a_row_that_ends_with_a_picture_the_last_token_counts(llava):
    given = batch("llava", size=2, length=7)
    given["input_ids"][0, -1] = IMAGE_TOKEN
    assert places(counted_positions(llava, given)) == [[23], [*range(17, 24)]]


def test_without_labels_and_pictures_all_tokens_count(llama, llava):
    given = batch("llama", size=2, length=7)
    assert counted_positions(llama, given).all()
    assert counted_positions(llava, given).all()
    without_mask = {"input_ids": given["input_ids"]}
    assert counted_positions(llama, without_mask).all()


@pytest.mark.parametrize("labels", [False, True])
def test_padding_shifts_what_counts(llava, labels):
    given = batch("llava", labels=labels)
    counted = counted_positions(llava, given)
    assert torch.equal(
        counted_positions(llava, padded(given, 4)), torch.nn.functional.pad(counted, (4, 0))
    )


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_padding_never_counts_and_every_row_has_a_position(llava, data):
    """Any mask, with holes too, any pictures, any labels."""
    rows, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))

    def table(values):
        row = st.lists(values, min_size=tokens, max_size=tokens)
        return torch.tensor(data.draw(st.lists(row, min_size=rows, max_size=rows)))

    given = {
        "input_ids": table(st.sampled_from([IMAGE_TOKEN, 11, 12])),
        "attention_mask": table(st.integers(0, 1)),
    }
    given["attention_mask"][:, data.draw(st.integers(0, tokens - 1))] = 1
    if data.draw(st.booleans()):
        given["labels"] = table(st.sampled_from([-100, 11]))
    counted = counted_positions(llava, given)
    assert counted.any(1).all()
    assert not (counted & (given["attention_mask"] == 0)).any()


def test_the_digest_tells_other_labels_apart_and_not_other_tokens(llama):
    given = batch("llama", labels=True)
    shorter = given | {"labels": given["labels"].clone()}
    shorter["labels"][:, :4] = -100

    def digest(one):
        return positions_digest(llama, Calibration.of(llama, [one]))

    assert digest(given) != digest(shorter)
    assert digest(given) == digest(batch("llama", seed=1, labels=True))
