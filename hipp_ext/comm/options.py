"""Options of LQ-SGD, in our spelling and in that of torch's PowerSGDState."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hipp_ext.comm.averaging import choose_transport
from hipp_ext.comm.codec import read_bits
from hipp_ext.errors import CompressionError
from hipp_ext.quantities import finite_option, whole_option

_SPELLINGS = {"matrix_approximation_rank": "rank", "random_seed": "seed"}  # PowerSGDState's


@dataclass(frozen=True, kw_only=True)
class Options:
    """How gradients are compressed; the same on every worker.

    Attributes:
        rank: largest rank of the factors. A lower rank sends fewer bytes, and leaves more of each
            gradient for later steps.
        bits: bits per value sent, 4 or 8. 4 bits halve the bytes and add noise.
        alpha: curvature of the quantisation levels; see `LogCodec`.
        transport: "auto", "all_gather" or "all_to_all"; see `choose_transport`.
        min_compression_rate: a matrix is factored only if its factors have this many times fewer
            values than the matrix.
        seed: random seed of the first factors.

    Raises:
        CompressionError: an option is out of range or not an exact number. Numbers of numpy and
            torch, and floats such as 8.0, are accepted; True and "4" are not.
    """

    rank: int = 4
    bits: int = 8
    alpha: float = 5.0
    transport: str = "auto"
    min_compression_rate: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        choose_transport(self.transport, 1, 0)
        error = CompressionError
        checked = {
            "rank": whole_option("rank", self.rank, error, 1),
            "bits": read_bits(self.bits),
            "alpha": finite_option("alpha", self.alpha, error),
            "min_compression_rate": finite_option(
                "min_compression_rate", self.min_compression_rate, error
            ),
            # The range of torch.Generator.
            "seed": whole_option("seed", self.seed, error, -(2**63), 2**63),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def plain(self) -> dict[str, int | float | str]:
        """The options as plain types, for files and comparisons."""
        return asdict(self)


def make_options(given: Mapping[str, Any]) -> Options:
    """Options from keyword arguments, in our spelling or in that of torch's PowerSGDState.

    Raises:
        CompressionError: an option is unknown, out of range, or given in both spellings.
    """
    ours: dict[str, Any] = {}
    for name, value in given.items():
        if (own := _SPELLINGS.get(name, name)) in ours:
            other = next(n for n in given if n != name and _SPELLINGS.get(n, n) == own)
            raise CompressionError(
                f"{other}={given[other]!r} and {name}={value!r} are the same option: give one."
            )
        ours[own] = value
    try:
        return Options(**ours)
    except TypeError as error:
        known = ", ".join([*Options.__dataclass_fields__, *_SPELLINGS])
        raise CompressionError(f"LQSGDState takes the options {known}: {error}") from None
