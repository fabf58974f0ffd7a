"""Laws of the codec."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hipp_ext.comm.codec import BITS, Blocks, LogCodec
from hipp_ext.errors import CompressionError

ALPHAS = st.sampled_from([0.5, 5.0, 30.0, 255.0])


@st.composite
def rows(draw):
    """A row of values of very different sizes, and its blocks."""
    lengths = draw(st.lists(st.integers(1, 70), min_size=1, max_size=5))
    lengths = [*lengths, 8 - sum(lengths) % 8]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    parts = [
        torch.randn(n, generator=generator) * 10.0 ** draw(st.integers(-30, 30))
        for n in lengths[:-1]
    ]
    values = torch.cat([*parts, torch.zeros(lengths[-1])])
    values[draw(st.integers(0, len(values) - 1))] = 0.0
    return values[None], Blocks(
        lengths=tuple(lengths), n_scales=len(lengths) + draw(st.integers(0, 3))
    )


def through(codec: LogCodec, values: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    return codec.decode(codec.encode(values, blocks), blocks)


@given(rows(), st.sampled_from(BITS), ALPHAS)
@settings(max_examples=60, deadline=None)
def test_decoded_values_are_within_the_bound_of_the_docstring(row, bits, alpha):
    values, blocks = row
    decoded = through(LogCodec(bits=bits, alpha=alpha), values, blocks).double()
    start = 0
    for length in blocks.lengths:
        x, y = values[0, start : start + length].double(), decoded[0, start : start + length]
        start += length
        h = 1 / (2 * (2 ** (bits - 1) - 1)) + 2**-11 / math.log1p(alpha)
        bound = (x.abs().max() / alpha + x.abs()) * ((1 + alpha) ** h - 1)
        assert ((y - x).abs() <= bound * (1 + 1e-5) + 2**-24 * x.abs().max()).all()


@given(rows(), st.sampled_from(BITS), ALPHAS)
@settings(max_examples=40, deadline=None)
def test_monotone_odd_and_zero_preserving(row, bits, alpha):
    (values, blocks), codec = row, LogCodec(bits=bits, alpha=alpha)
    decoded = through(codec, values, blocks)
    assert torch.equal(through(codec, -values, blocks), -decoded)
    assert (decoded[values == 0] == 0).all()
    start = 0
    for length in blocks.lengths:
        order = values[0, start : start + length].argsort()
        assert (decoded[0, start : start + length][order].diff() >= 0).all()
        start += length


@pytest.mark.parametrize("bits", BITS)
def test_a_message_is_scales_and_packed_codes(bits):
    codec, blocks = LogCodec(bits=bits), Blocks(lengths=(50, 14, 32), n_scales=5)
    values = torch.randn(3, 96)
    message = codec.encode(values, blocks)
    assert message.shape == (3, codec.message_bytes(blocks)) == (3, 4 * 5 + 12 * bits)
    scales = message[:, :20].clone().view(torch.float32)
    assert torch.equal(scales[:, 0], values[:, :50].abs().amax(1))
    assert (scales[:, 3:] == 0).all()
    assert torch.equal(
        codec.decode(message[1:2], blocks), codec.decode(message, blocks)[1:2]
    )  # rows are independent


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_value_makes_its_piece_not_finite_and_no_other(bits, bad):
    blocks = Blocks(lengths=(20, 44), n_scales=2)
    values = torch.randn(1, 64)
    values[0, 7] = bad
    decoded = through(LogCodec(bits=bits), values, blocks)
    assert not decoded[0, :20].isfinite().any() and decoded[0, 20:].isfinite().all()


@pytest.mark.parametrize(("bits", "most"), [(8, 0.007), (4, 0.13)])
def test_error_on_gaussian_columns(bits, most):
    values = torch.randn(16, 2048)
    blocks = Blocks(lengths=(2048,), n_scales=1)
    assert (through(LogCodec(bits=bits), values, blocks) - values).norm() / values.norm() < most


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, r"bits=0: a whole number \(4 or 8\) is needed"),
        ({"bits": 9}, r"bits=9: a whole number \(4 or 8\)"),
        ({"bits": True}, "bits=True: a whole number"),
        ({"bits": 8, "alpha": 0.0}, "alpha=0.0: a finite number above 0"),
        ({"bits": 8, "alpha": math.nan}, "alpha=nan: a finite number above 0"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(CompressionError, match=message):
        LogCodec(**arguments)
