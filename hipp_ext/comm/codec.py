"""Log quantisation: float32 values -> codes of 1 to 8 bits, packed, with one float32 scale per piece; and back.

A piece is a stretch of values of like size, such as one column of a factor, or a bias. Codes are whole-number levels of
sign(y) ln(1 + alpha |y|) / ln(1 + alpha) with y = value / scale, so small values get finer levels than large ones.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from hipp_ext.comm.exact import positive_number, whole_number

UNIT = 32  # values: packed rows of any width are whole 4-byte words then, so that float32 scales stay aligned
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """How a row of values is cut: the length of each piece, and how many scales a message has room for.

    Attributes:
        lengths: values per piece; their sum is a multiple of UNIT.
        slots: scales per message, at least one per piece; the rest are sent as 0.
    """

    lengths: tuple[int, ...]
    slots: int

    @functools.cached_property
    def size(self) -> int:
        """Values in a row."""
        return sum(self.lengths)

    @functools.cached_property
    def runs(self) -> tuple[tuple[int, int, int, int], ...]:
        """(first value, first piece, pieces, length) of each stretch of pieces of one length."""
        found, value, piece = [], 0, 0
        for length, group in itertools.groupby(self.lengths):
            count = len(tuple(group))
            found.append((value, piece, count, length))
            value, piece = value + count * length, piece + count
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class LogCodec:
    """Encodes rows of float32 values into uint8 messages, and decodes them.

    Error of a value x in a piece with scale s = max |x| (2 bits or more, L = 2^(bits-1) - 1 levels on either side):
    |decode(encode(x)) - x| <= (s / alpha + |x|) * ((1 + alpha)^h - 1), h = 1 / (2 L) + 2^-11 / ln(1 + alpha). The first part
    of h is half a level. The second is there because y is rounded to float16 before the level is looked up: that moves y by
    2^-11 |y| at most, and the level by alpha |y| / (1 + alpha |y|) / ln(1 + alpha) times 2^-11. Encoding is monotone, odd, and
    keeps zero. At 1 bit only the sign is sent, s is the mean of |x|, and zero becomes s.

    A piece whose s is below the least normal float32 is sent as zeros. Where a piece holds inf or NaN, its scale does too, and
    all of it decodes to inf or NaN, in every process.

    Args:
        bits: per value, 1 to 8.
        alpha: how much finer small values are quantised; 5 fits factors of gradients best (range tried: 1 to 255).

    Raises:
        CompressionError: `bits` or `alpha` is out of range.

    Source: LQ-SGD (arXiv 2506.17974), logarithmic quantisation with scale.
    Differs from the paper: its range, rounding and scales are not public in full; chosen here: one scale per piece, rounding to
    the nearest level, whole levels on both sides of zero.
    """

    bits: int
    alpha: float = 5.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", whole_number("bits", self.bits, 1, 8))
        object.__setattr__(self, "alpha", positive_number("alpha", self.alpha))

    def message_bytes(self, pieces: Pieces) -> int:
        """Bytes that a row of values takes."""
        return 4 * pieces.slots + pieces.size * self.bits // 8

    def encode(
        self, values: Float32[Tensor, "rows values"], pieces: Pieces
    ) -> UInt8[Tensor, "rows bytes"]:
        """`values` (rows, pieces.size) float32 -> messages (rows, message_bytes) uint8: scales, then packed codes."""
        scales = values.new_zeros(len(values), pieces.slots)
        shares = torch.empty_like(values, dtype=torch.float16)
        for value, piece, count, length in pieces.runs:
            block = values[:, value : value + count * length].unflatten(1, (count, length))
            scale = (
                block.abs().mean(2)
                if self.bits == 1
                else torch.maximum(block.amax(2), -block.amin(2))
            )
            scale = torch.where(scale < TINY, 0.0, scale)  # NaN stays
            scales[:, piece : piece + count] = scale
            inverse = torch.where(scale > 0, 1 / scale, 0.0)[..., None]
            torch.mul(
                block,
                inverse,
                out=shares[:, value : value + count * length].unflatten(1, (count, length)),
            )
        index = shares.view(torch.uint16).int().flatten()
        codes = (
            _code_table(self.bits, self.alpha, values.device).index_select(0, index).view_as(values)
        )
        return torch.cat([scales.view(torch.uint8), pack(codes, self.bits)], 1)

    def decode(
        self, messages: UInt8[Tensor, "rows bytes"], pieces: Pieces
    ) -> Float32[Tensor, "rows values"]:
        """`messages` (rows, message_bytes) uint8 -> values (rows, pieces.size) float32."""
        # A fresh copy: a slice that is a single row may stay unaligned through .contiguous().
        scales = messages[:, : 4 * pieces.slots].clone().view(torch.float32)
        packed = messages[:, 4 * pieces.slots :].clone()
        if self.bits in (3, 5, 6, 7):
            index = unpack(packed, self.bits)
            table = _value_table(self.bits, self.alpha, False, messages.device)
        else:
            index = packed.view(torch.uint16) if self.bits == 8 else packed
            table = _value_table(self.bits, self.alpha, True, messages.device)
        values = (
            table.index_select(0, index.int().flatten())
            .view(torch.float32)
            .view(len(messages), pieces.size)
        )
        for value, piece, count, length in pieces.runs:
            block = values[:, value : value + count * length].unflatten(1, (count, length))
            block.mul_(scales[:, piece : piece + count, None])
        return values


def pack(codes: UInt8[Tensor, "rows values"], bits: int) -> UInt8[Tensor, "rows bytes"]:
    """Codes (rows, values) uint8 below 2^bits -> (rows, values * bits / 8) uint8, the first code in the lowest bits.

    The number of values is a multiple of 8.
    """
    if bits == 8:
        return codes
    if (kind := {4: torch.int16, 2: torch.int32, 1: torch.int64}.get(bits)) is not None:
        words = codes.contiguous().view(
            kind
        )  # one code per byte; shifted, they meet in the lowest byte
        packed = words
        for place in range(1, 8 // bits):
            packed = packed | (words >> ((8 - bits) * place))
        return packed.to(torch.uint8)
    words = (
        codes.unflatten(1, (-1, 8)).long() << (bits * torch.arange(8, device=codes.device))
    ).sum(2)
    return words[..., None].view(torch.uint8)[..., :bits].flatten(1)


def unpack(packed: UInt8[Tensor, "rows bytes"], bits: int) -> UInt8[Tensor, "rows values"]:
    """The inverse of `pack`."""
    words = torch.zeros(
        len(packed), packed.shape[1] // bits, 8, dtype=torch.uint8, device=packed.device
    )
    words[..., :bits] = packed.unflatten(1, (-1, bits))
    shifts = bits * torch.arange(8, device=packed.device)
    return ((words.view(torch.int64) >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(1)


@functools.lru_cache(maxsize=32)
def _code_table(bits: int, alpha: float, device: torch.device) -> Tensor:
    """The code of every float16 value, by its bits. 64 KB: stays in the cache, where a logarithm per value would not pay."""
    y = (
        torch.arange(65536, dtype=torch.int32)
        .to(torch.uint16)
        .view(torch.float16)
        .double()
        .nan_to_num(0, 1, -1)
        .clamp(-1, 1)
    )
    if bits == 1:
        return (y >= 0).to(torch.uint8).to(device)
    levels = 2 ** (bits - 1) - 1
    level = (torch.log1p(alpha * y.abs()) * (levels / math.log1p(alpha))).round()
    return (level * y.sign() + levels + 1).to(torch.uint8).to(device)


@functools.lru_cache(maxsize=32)
def _value_table(bits: int, alpha: float, whole_words: bool, device: torch.device) -> Tensor:
    """What codes decode to with scale 1. `whole_words`: all values in a byte (at 8 bits: in two) at once, as one number."""
    if bits == 1:
        values = torch.tensor([-1.0, 1.0])
    else:
        levels = 2 ** (bits - 1) - 1
        t = (torch.arange(2**bits).double() - (levels + 1)).clamp_min(-levels) / levels
        values = (t.sign() * torch.expm1(t.abs() * math.log1p(alpha)) / alpha).float()
    if whole_words:
        per, places = (2, 65536) if bits == 8 else (8 // bits, 256)
        word = torch.arange(places)
        values = torch.stack(
            [values[(word >> (bits * place)) & (2**bits - 1)] for place in range(per)], 1
        )
        kind = {2: torch.complex64, 4: torch.complex128}.get(per)
        values = values if kind is None else values.view(kind).flatten()
    return values.to(device)
