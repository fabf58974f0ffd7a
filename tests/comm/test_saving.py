"""Saved states as files, whole and damaged; and options that are no plain numbers."""

import json
import math
import os
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hipp_ext.comm import Compressor, Options
from hipp_ext.comm.saving import (
    Counts,
    load_state,
    pack_state,
    parse_state,
    read_state,
    save_state,
    unpack_state,
)
from hipp_ext.errors import CompressionError
from hipp_ext.files.sealed import seal


class OneRank:
    """What files are made of and go into: a compressor without a process group."""

    def __init__(self):
        self.compressor = Compressor({"w": (20, 30), "b": (7,)}, Options(rank=2), workers=1)

    def state_dict(self):
        return pack_state(self.compressor, Counts(steps=3, loss_scale=2.0))

    def load_state_dict(self, state):
        return unpack_state(self.compressor, parse_state(state))


def contents(state):
    saved = state.state_dict()
    return {f"{part}.{n}": t for part in ("residual", "factors") for n, t in saved[part].items()}


@pytest.fixture
def one(tmp_path):
    state = OneRank()
    gradients = {
        n: torch.randn(s, generator=torch.Generator().manual_seed(1))
        for n, s in state.compressor.shapes.items()
    }
    with pytest.raises(StopIteration):
        exchange = state.compressor.step(gradients)
        packet = next(exchange)
        while True:
            packet = exchange.send(packet.rows)
    return state, save_state(state, tmp_path / "state.safetensors")


def test_every_damaged_file_is_refused_or_holds_what_was_saved(one, tmp_path):
    state, file = one
    data, wanted, rng = file.read_bytes(), contents(state), random.Random(0)
    flips = [(rng.randrange(len(data)), rng.randrange(8)) for _ in range(300)]
    mutations = [data[:i] + bytes([data[i] ^ (1 << bit)]) + data[i + 1 :] for i, bit in flips]
    for _ in range(200):
        start, size = rng.randrange(len(data)), rng.randrange(1, 64)
        middle = rng.choice(
            [
                b"",
                rng.randbytes(size),
                b"\0" * size,
                data[start : start + size] * 2,
                b"[" * 5000,
                b"9" * 500,
            ]
        )
        mutations.append(data[:start] + middle + data[start + size :])
    target, refused = tmp_path / "mutated", 0
    for mutation in mutations:
        target.write_bytes(mutation)
        other = OneRank()
        try:
            load_state(other, target)
        except CompressionError:
            refused += 1
        else:
            assert all(torch.equal(t, wanted[n]) for n, t in contents(other).items())
    assert refused > 0.9 * len(mutations)
    for i, bit in flips:
        if i > len(data) - 4 * sum(t.numel() for t in wanted.values()):
            target.write_bytes(data[:i] + bytes([data[i] ^ (1 << bit)]) + data[i + 1 :])
            with pytest.raises(CompressionError, match="do not have the digest|missing, damaged"):
                load_state(OneRank(), target)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ("[" * 100_000, "missing, damaged, or holds no LQ-SGD state"),
        ("[]", "missing, damaged, or holds no LQ-SGD state"),
        ("9" * 5000, "missing, damaged, or holds no LQ-SGD state"),
        ({"workers": True}, "workers: Input should be a valid integer"),
        ({"workers": "1"}, "workers: Input should be a valid integer"),
        ({"counts": {"steps": 10**30}}, "counts.steps"),
        ({"counts": {"loss_scale": math.inf}}, "counts.loss_scale"),
        ({"options": [1]}, "options: Input should be a valid dictionary"),
        ({"more": 1}, "more: Extra inputs"),
    ],
)
def test_metadata_that_says_something_else(one, plain, message, tmp_path):
    state, file = one
    tensors = load_file(file)
    if isinstance(plain, dict):
        saved = {k: v for k, v in state.state_dict().items() if k not in ("residual", "factors")}
        (tmp_path / "other").write_bytes(seal(tensors, saved | plain))
    else:
        save_file(tensors, tmp_path / "other", {"sealed": plain})
    with pytest.raises(CompressionError, match=message):
        load_state(OneRank(), tmp_path / "other")


def test_what_is_no_file_of_ours(one, tmp_path):
    state, file = one
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_bytes((10**9).to_bytes(8, "little") + b"{" * 2_000_000)
    doubled = {n: t.double() for n, t in load_file(file).items()}
    plain = {k: v for k, v in read_state(file).items() if k not in ("residual", "factors")}
    (tmp_path / "double").write_bytes(seal(doubled, plain))
    (tmp_path / "nameless").write_bytes(seal({"residual": torch.zeros(1)}))
    save_file(load_file(file), tmp_path / "others")
    for name, message in (
        ("pipe", "no LQ-SGD state: .* is no file"),
        ("", "no LQ-SGD state: .* is no file"),
        ("a\0b", "no LQ-SGD state: .* is missing"),
        ("long", "no LQ-SGD state: .* is damaged: .*[Hh]eader"),
        ("double", "torch.float64: dense float32 is needed"),
        ("nameless", "no LQ-SGD state: not enough values to unpack"),
        ("others", "no LQ-SGD state: .* is damaged"),
    ):
        with pytest.raises(CompressionError, match=f"(?s){message}"):
            load_state(OneRank(), f"{tmp_path}/{name}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.double(),
            "residual of w is torch.strided, torch.float64: dense float32 is needed",
        ),
        (lambda t: t.int(), "torch.int32: dense float32"),
        (lambda t: t.to_sparse(), "torch.sparse_coo, torch.float32"),
        (lambda t: t.to("meta"), "dense float32 is needed"),
        (lambda t: t.tolist(), "'residual' must be a dict of tensors, got dict"),
    ],
)
def test_tensors_of_another_kind(one, change, message):
    state, _ = one
    saved = state.state_dict()
    saved["residual"]["w"] = change(saved["residual"]["w"])
    before = contents(state)
    with pytest.raises(CompressionError, match=message):
        state.load_state_dict(saved)
    with pytest.raises(CompressionError, match="not a state of LQSGDState: list"):
        state.load_state_dict([])
    assert all(torch.equal(t, before[n]) for n, t in contents(state).items())


def test_what_is_read_is_what_was_written(one):
    state, file = one
    saved, read = state.state_dict(), read_state(file)
    assert {k: v for k, v in read.items() if k not in ("residual", "factors")} == {
        k: v for k, v in saved.items() if k not in ("residual", "factors")
    }
    assert load_state(other := OneRank(), file) == [] and all(
        t.any() for t in contents(other).values()
    )
    assert all(torch.equal(t, contents(state)[n]) for n, t in contents(other).items())


@pytest.mark.parametrize(
    "four", [4, np.int64(4), np.uint8(4), 4.0, np.float32(4), torch.tensor(4), np.array(4)]
)
def test_numbers_of_any_type_are_taken_where_exact(four):
    options = Options(rank=four, bits=four, alpha=four, min_compression_rate=four, seed=four)
    assert options == Options(rank=4, bits=4, alpha=4.0, min_compression_rate=4.0, seed=4)
    assert json.loads(json.dumps(options.plain())) == options.plain()
    assert {type(v) for v in options.plain().values()} == {int, float, str}


@pytest.mark.parametrize("name", ["rank", "bits", "seed", "alpha", "min_compression_rate"])
@pytest.mark.parametrize(
    "value",
    [
        True,
        np.True_,
        torch.tensor(True),
        "4",
        math.nan,
        np.float64("nan"),
        math.inf,
        [4],
        torch.tensor([4, 4]),
        4j,
        b"4",
    ],
)
def test_what_is_no_number_is_refused(name, value):
    with pytest.raises(CompressionError, match=rf"{name}=.*: a (whole|finite) number .* is needed"):
        Options(**{name: value})


@pytest.mark.parametrize("name", ["rank", "bits", "seed"])
def test_half_a_number_is_refused(name):
    with pytest.raises(CompressionError, match=f"{name}=4.5: a whole number"):
        Options(**{name: 4.5})


@pytest.mark.parametrize(
    "options", [{"seed": 2**64}, {"alpha": 10**400}, {"transport": ["auto"]}, {"transport": None}]
)
def test_out_of_range(options):
    with pytest.raises(CompressionError, match="is needed"):
        Options(**options)
