"""Mixtures of experts by experts: a unit is a routed expert, with its row of the router."""

import contextlib
from collections.abc import Iterator
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from hipp_ext.families import EXPERT_COUNTS, EXPERTS
from hipp_ext.kinds.base import Look
from hipp_ext.kinds.mixture import Mixture
from hipp_ext.kinds.mixture_kind import MixtureKind, expert_slices, mixture_of
from hipp_ext.kinds.routing import routed_among
from hipp_ext.kinds.slices import Slice
from hipp_ext.kinds.taps import tapped


class Experts(MixtureKind):
    """Mixtures of experts, by experts.

    A unit owns its weights and its entries of the router. Where the router chooses among groups of
    experts first (DeepSeek), every group keeps the same number.
    """

    name = "experts"
    unit = "experts"
    fields = EXPERT_COUNTS
    neutral_zeros = False  # a router may send tokens to an expert of zeros

    def width(self, block: Any, name: str) -> int:
        """Number of routed experts."""
        return mixture_of(block).count

    def sections(self, block: Any) -> int:
        """Number of groups that the router chooses among first."""
        return mixture_of(block).sections

    def least(self, block: Any) -> int:
        """As many as every token is sent to, and as the router's choice of groups needs."""
        return mixture_of(block).least

    def owns(self, block: Any, name: str, width: int) -> tuple[Slice, ...]:
        """Entries of the router, then the expert's weights, those that read its channels last."""
        return expert_slices(mixture_of(block), name)

    def multiple(self, columns: int, round_to: int, sections: int) -> int:
        """The matrices of an expert stay as they are, whatever `round_to` says."""
        return sections

    def active_share(self, block: Any, part: Slice) -> float:
        """Only entries of the router count: as many experts as before compute for a token."""
        return float(f".{EXPERTS}." not in part.parameter)

    def inputs(self, block: Any, owns: tuple[Slice, ...]) -> int:
        """Those of the expert in the wide linear layer, see `mixture`."""
        return mixture_of(block).columns

    def attributes(self, block: Any, columns: int, width: int) -> dict[str, int]:
        """Number of experts."""
        return {"num_experts": width}

    def unit_by_unit(self, mixture: Mixture, values: Tensor) -> Tensor:
        """All columns of an expert side by side."""
        return values.flatten(1)

    @contextlib.contextmanager
    def watch(self, block: Any, consumer: Any, look: Look) -> Iterator[None]:
        """See `tapped`: for each expert its tokens, scaled by the router's weights."""
        mixture = mixture_of(block)
        size = mixture.columns

        def tap(z: Tensor, token: Tensor, expert: int) -> Tensor:
            found = look(z, token, slice(expert * size, (expert + 1) * size))
            return z if found is None else found

        with tapped(mixture, tap):
            yield

    def mask(self, block: Any, consumer: Any, columns: int, mask: Bool[Tensor, " width"]) -> Any:
        """Tokens are sent to the other experts, as after pruning."""
        return routed_among(mixture_of(block), mask.nonzero()[:, 0])
