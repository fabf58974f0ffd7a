"""Laws of the codec, for all widths."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hipp_ext.comm.codec import LogCodec, Pieces, pack, unpack
from hipp_ext.errors import CompressionError

BITS = range(1, 9)
ALPHAS = st.sampled_from([0.5, 5.0, 30.0, 255.0])


@st.composite
def rows(draw):
    """A row of values of very different sizes, and its pieces."""
    lengths = draw(st.lists(st.integers(1, 70), min_size=1, max_size=5))
    lengths = [*lengths, 32 - sum(lengths) % 32]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    parts = [
        torch.randn(n, generator=generator) * 10.0 ** draw(st.integers(-30, 30))
        for n in lengths[:-1]
    ]
    values = torch.cat([*parts, torch.zeros(lengths[-1])])
    values[draw(st.integers(0, len(values) - 1))] = 0.0
    return values[None], Pieces(
        lengths=tuple(lengths), slots=len(lengths) + draw(st.integers(0, 3))
    )


def through(codec: LogCodec, values: torch.Tensor, pieces: Pieces) -> torch.Tensor:
    return codec.decode(codec.encode(values, pieces), pieces)


@given(rows(), st.sampled_from(BITS), ALPHAS)
@settings(max_examples=60, deadline=None)
def test_decoded_values_are_within_the_bound_of_the_docstring(row, bits, alpha):
    values, pieces = row
    decoded = through(LogCodec(bits=bits, alpha=alpha), values, pieces).double()
    start = 0
    for length in pieces.lengths:
        x, y = values[0, start : start + length].double(), decoded[0, start : start + length]
        start += length
        if bits == 1:
            scale = x.abs().mean()
            assert torch.allclose(y, torch.where(x >= 0, scale, -scale), rtol=1e-5)
            continue
        h = 1 / (2 * (2 ** (bits - 1) - 1)) + 2**-11 / math.log1p(alpha)
        bound = (x.abs().max() / alpha + x.abs()) * ((1 + alpha) ** h - 1)
        assert ((y - x).abs() <= bound * (1 + 1e-5) + 2**-24 * x.abs().max()).all()


@given(rows(), st.integers(2, 8), ALPHAS)
@settings(max_examples=40, deadline=None)
def test_monotone_odd_and_zero_preserving(row, bits, alpha):
    (values, pieces), codec = row, LogCodec(bits=bits, alpha=alpha)
    decoded = through(codec, values, pieces)
    assert torch.equal(through(codec, -values, pieces), -decoded)
    assert (decoded[values == 0] == 0).all()
    start = 0
    for length in pieces.lengths:
        order = values[0, start : start + length].argsort()
        assert (decoded[0, start : start + length][order].diff() >= 0).all()
        start += length


@given(st.sampled_from(BITS), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_packing_keeps_every_code_and_wastes_no_bit(bits, count, words, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (count, 8 * words), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (count, bits * words)
    if bits in (3, 5, 6, 7):
        assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_a_message_is_scales_and_packed_codes(bits):
    codec, pieces = LogCodec(bits=bits), Pieces(lengths=(50, 14, 32), slots=5)
    values = torch.randn(3, 96)
    message = codec.encode(values, pieces)
    assert message.shape == (3, codec.message_bytes(pieces)) == (3, 4 * 5 + 12 * bits)
    scales = message[:, :20].clone().view(torch.float32)
    expected = values[:, :50].abs()
    assert (
        torch.equal(scales[:, 0], expected.mean(1) if bits == 1 else expected.amax(1))
        and (scales[:, 3:] == 0).all()
    )
    assert torch.equal(
        codec.decode(message[1:2], pieces), codec.decode(message, pieces)[1:2]
    )  # rows are independent


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_value_makes_its_piece_not_finite_and_no_other(bits, bad):
    pieces = Pieces(lengths=(20, 44), slots=2)
    values = torch.randn(1, 64)
    values[0, 7] = bad
    decoded = through(LogCodec(bits=bits), values, pieces)
    assert not decoded[0, :20].isfinite().any() and decoded[0, 20:].isfinite().all()


@pytest.mark.parametrize(("bits", "most"), [(8, 0.007), (4, 0.13)])
def test_error_on_gaussian_columns(bits, most):
    values = torch.randn(16, 2048)
    pieces = Pieces(lengths=(2048,), slots=1)
    assert (through(LogCodec(bits=bits), values, pieces) - values).norm() / values.norm() < most


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "bits=0: a whole number from 1 to 8"),
        ({"bits": 9}, "bits=9: a whole number from 1 to 8"),
        ({"bits": True}, "bits=True: a whole number"),
        ({"bits": 8, "alpha": 0.0}, "alpha=0.0: a finite number above 0"),
        ({"bits": 8, "alpha": math.nan}, "alpha=nan: a finite number above 0"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(CompressionError, match=message):
        LogCodec(**arguments)
