"""Mixtures of experts by channels: a unit is a channel of all routed experts of a block at once,
which stay equally wide.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hipp_ext.families import EXPERT_WIDTHS, EXPERTS
from hipp_ext.kinds.base import Look
from hipp_ext.kinds.mixture import Mixture
from hipp_ext.kinds.mixture_kind import MixtureKind, mixture_of
from hipp_ext.kinds.sized_config import SizedConfig
from hipp_ext.kinds.slices import Slice
from hipp_ext.kinds.taps import tapped

ALIGNED_BYTES = 16  # rows of matrices that torch.grouped_mm multiplies are multiples of it
ALIGNED = 8  # numbers in half precision


class ExpertChannels(MixtureKind):
    """The same blocks, by channels: unit j is channel j of every routed expert of the block."""

    name = "expert_channels"
    unit = "channels of all experts"
    fields = EXPERT_WIDTHS

    def find(self, layer: nn.Module) -> list[nn.Module]:
        """None: `Experts` finds the blocks, and `find_groups` is told which unit to take."""
        return []

    def width(self, block: Any, name: str) -> int:
        """Channels of each expert."""
        return mixture_of(block).width

    def owns(self, block: Any, name: str, width: int) -> tuple[Slice, ...]:
        """Rows of all gate and up projections, columns of all down projections."""
        mixture, experts = mixture_of(block), f"{name}.{EXPERTS}"
        size = 2 if mixture.interleaved else 1
        starts = (0, width) if mixture.gated and not mixture.interleaved else (0,)
        rows = [(mixture.up, 2 if mixture.transposed else 1)]
        rows += [(f"{mixture.up}_bias", 1)] * mixture.biased
        read = Slice(parameter=f"{experts}.down_proj", dim=mixture.channel_dim, size=1)
        return (
            *(
                Slice(parameter=f"{experts}.{part}", dim=dim, size=size, start=start)
                for part, dim in rows
                for start in starts
            ),
            read,
        )

    def inputs(self, block: Any, owns: tuple[Slice, ...]) -> int:
        """One of every expert."""
        return mixture_of(block).count

    def active_share(self, block: Any, part: Slice) -> float:
        """The part of the experts that computes for a token."""
        mixture = mixture_of(block)
        return min(1.0, mixture.top_k / mixture.count)

    def attributes(self, block: Any, columns: int, width: int) -> dict[str, int]:
        """Channels of each expert, under the names that models have for them."""
        return dict.fromkeys(("intermediate_dim", "intermediate_size", "expert_dim"), width)

    def multiple(self, columns: int, round_to: int, sections: int) -> int:
        """Channels of every expert, in whole numbers of ALIGNED ones."""
        return math.lcm(round_to, ALIGNED)

    def resize(self, block: Any, columns: int, width: int) -> None:
        """Experts whose rows are not aligned compute one after the other: fused kernels refuse
        them.
        """
        super().resize(block, columns, width)
        experts = block.experts
        config = getattr(experts, "config", None)
        if config is None:
            return
        experts.config = shared = getattr(config, "_shared", config)
        if width * experts.down_proj.element_size() % ALIGNED_BYTES:
            experts.config = SizedConfig(shared, _experts_implementation="eager")

    def unit_by_unit(self, mixture: Mixture, values: Tensor) -> Tensor:
        """A channel's columns of all experts side by side; biases have none."""
        return values[..., : mixture.width].transpose(1, 2).flatten(1)

    @contextlib.contextmanager
    def watch(self, block: Any, consumer: Any, look: Look) -> Iterator[None]:
        """See `tapped`: for each expert its tokens, scaled by the router's weights."""
        mixture = mixture_of(block)
        width = mixture.width

        def tap(z: Tensor, token: Tensor, expert: int) -> Tensor:
            # What `look` is shown is what goes on, so that its gradient can be watched too.
            x, rest = z.split([width, z.shape[1] - width], 1) if mixture.biased else (z, None)
            found = look(x, token, slice(expert, None, mixture.count))
            x = x if found is None else found
            return x if rest is None else torch.cat([x, rest], 1)

        with tapped(mixture, tap):
            yield
