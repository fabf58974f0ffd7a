"""Log quantisation: float32 values to packed 4-bit or 8-bit codes with one float32 scale per block.

A block is a run of values of similar size, such as one column of a factor, or a bias. A code is
the nearest level of sign(y) ln(1 + alpha |y|) / ln(1 + alpha) with y = value / scale, so small
values have finer levels than large ones.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from hipp_ext.errors import CompressionError
from hipp_ext.quantities import finite_option, whole_option

BITS = (4, 8)
ALIGNMENT = 8  # values; so packed rows end on 4 bytes at 4 and 8 bits, and scales stay aligned
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How a row of values is divided into blocks.

    Attributes:
        lengths: values per block; their sum is a multiple of ALIGNMENT.
        n_scales: scales per message, at least one per block; the rest are sent as 0.
    """

    lengths: tuple[int, ...]
    n_scales: int

    @functools.cached_property
    def size(self) -> int:
        """Values in a row."""
        return sum(self.lengths)

    @functools.cached_property
    def segments(self) -> tuple[tuple[slice, slice, int], ...]:
        """(values, blocks, length of a block) of each run of blocks of equal length."""
        found, value, block = [], 0, 0
        for length, group in itertools.groupby(self.lengths):
            count = len(tuple(group))
            end = value + count * length, block + count
            found.append((slice(value, end[0]), slice(block, end[1]), length))
            value, block = end
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class LogCodec:
    """Encodes rows of float32 values into uint8 messages, and decodes them.

    The error of a value x in a block with scale s = max |x| and L = 2^(bits-1) - 1 levels per sign:
    |decode(encode(x)) - x| <= (s / alpha + |x|) * ((1 + alpha)^h - 1), with
    h = 1 / (2 L) + 2^-11 / ln(1 + alpha). The first term of h is half a level. The second term is
    there because y is rounded to float16 before its level is looked up: this moves y by at most
    2^-11 |y|. Encoding is monotone and odd, and zero stays zero.

    A block whose scale is below the smallest normal float32 is sent as zeros. A block with an inf
    or NaN has such a scale, and decodes to inf or NaN throughout, in every process.

    Args:
        bits: bits per value, 4 or 8.
        alpha: curvature of the levels; larger values give finer levels near zero. 5 fits the
            factors of gradients best (tried from 1 to 255).

    Raises:
        CompressionError: `bits` or `alpha` is out of range.

    Source: LQ-SGD (arXiv 2506.17974), logarithmic quantisation with a scale.
    Differs from the paper: its range, rounding and scales are not fully public. We use one scale
        per block, rounding to the nearest level, and an equal number of levels on both sides of
        zero.
    """

    bits: int
    alpha: float = 5.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", read_bits(self.bits))
        alpha = finite_option("alpha", self.alpha, CompressionError)
        object.__setattr__(self, "alpha", alpha)

    def message_bytes(self, blocks: Blocks) -> int:
        """Bytes of the message of one row."""
        return 4 * blocks.n_scales + blocks.size * self.bits // 8

    def encode(
        self, values: Float32[Tensor, "rows values"], blocks: Blocks
    ) -> UInt8[Tensor, "rows bytes"]:
        """Messages (rows, message_bytes) uint8 of `values` (rows, blocks.size): scales, codes."""
        scales = values.new_zeros(len(values), blocks.n_scales)
        relative = torch.empty_like(values, dtype=torch.float16)
        for span, block, length in blocks.segments:
            part = values[:, span].unflatten(1, (-1, length))
            scale = torch.maximum(part.amax(2), -part.amin(2))
            scale = torch.where(scale < TINY, 0.0, scale)  # NaN stays
            scales[:, block] = scale
            inverse = torch.where(scale > 0, 1 / scale, 0.0)[..., None]
            torch.mul(part, inverse, out=relative[:, span].unflatten(1, (-1, length)))
        table = _code_table(self.bits, self.alpha, values.device)
        codes = table[relative.view(torch.uint16).int()]
        if self.bits == 4:
            codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
        return torch.cat([scales.view(torch.uint8), codes], 1)

    def decode(
        self, messages: UInt8[Tensor, "rows bytes"], blocks: Blocks
    ) -> Float32[Tensor, "rows values"]:
        """Values (rows, blocks.size) float32 of `messages` (rows, message_bytes) uint8."""
        # clone, because a slice of a single row counts as contiguous and may stay unaligned.
        scales = messages[:, : 4 * blocks.n_scales].clone().view(torch.float32)
        codes = messages[:, 4 * blocks.n_scales :].int().flatten()
        table = _value_table(self.bits, self.alpha, messages.device)
        values = table.index_select(0, codes).view(len(messages), blocks.size)
        for span, block, length in blocks.segments:
            values[:, span].unflatten(1, (-1, length)).mul_(scales[:, block, None])
        return values


def read_bits(bits: Any) -> int:
    """`bits` as an int.

    Raises:
        CompressionError: it is neither 4 nor 8.
    """
    try:
        number = whole_option("bits", bits, CompressionError, min(BITS), max(BITS))
    except CompressionError:
        number = None
    if number not in BITS:
        raise CompressionError(f"bits={bits!r}: a whole number (4 or 8) is needed.")
    return number


@functools.lru_cache(maxsize=32)
def _code_table(bits: int, alpha: float, device: torch.device) -> Tensor:
    """The code of every float16 value: 64 KB that replace a logarithm per value."""
    y = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16).double()
    y = y.nan_to_num(0, 1, -1).clamp(-1, 1)
    levels = 2 ** (bits - 1) - 1
    level = (torch.log1p(alpha * y.abs()) * (levels / math.log1p(alpha))).round()
    return (level * y.sign() + levels + 1).to(torch.uint8).to(device)


@functools.lru_cache(maxsize=32)
def _value_table(bits: int, alpha: float, device: torch.device) -> Tensor:
    """The values at scale 1 of the codes in every byte: (256, codes per byte)."""
    levels = 2 ** (bits - 1) - 1
    t = (torch.arange(2**bits).double() - (levels + 1)).clamp_min(-levels) / levels
    values = (t.sign() * torch.expm1(t.abs() * math.log1p(alpha)) / alpha).float()
    byte = torch.arange(256)
    codes = [(byte >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack([values[code] for code in codes], 1).to(device)
