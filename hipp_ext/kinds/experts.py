"""Mixtures of experts, in one of two units.

Kind "experts": a unit is a routed expert, with its row of the router.
Kind "expert_channels": a unit is a channel of all routed experts of a block at once, which stay
equally wide.
Experts that every token passes (shared experts) belong to no unit; they leave with a dropped block.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.families import (
    BLOCKS,
    EXPERT_COUNTS,
    EXPERT_WIDTHS,
    EXPERTS,
    ROUTED_WITH_LOGITS,
    common_value,
)
from hipp_ext.kinds.base import BlockKind, Look, Skip
from hipp_ext.kinds.mixture import Mixture
from hipp_ext.kinds.routing import routed_among
from hipp_ext.kinds.sized_config import SizedConfig
from hipp_ext.kinds.slices import Slice
from hipp_ext.kinds.taps import tapped

ALIGNED_BYTES = 16  # rows of matrices that torch.grouped_mm multiplies are multiples of it
ALIGNED = 8  # numbers in half precision
_NAMES = replace(
    BLOCKS["ffn"],
    producers=(("a router (gate, router)", EXPERTS),),
    fused={},
    consumers=(EXPERTS,),
    skip="moe",
)


class _Mixtures(BlockKind):
    """What both units of a mixture have in common."""

    place = "ffn"
    names = _NAMES
    linear = False

    def match(self, block: nn.Module) -> tuple[list[str], str] | None:
        """The experts, which both compute the units and read them."""
        return ([EXPERTS], EXPERTS) if Mixture.of(block) else None

    def reading_weight(self, block: Any, consumer: Any) -> Tensor:
        """The down projections of all experts, side by side, unit by unit."""
        mixture = mixture_of(block)
        weights = torch.stack([mixture.reading_weight(e) for e in range(mixture.count)], 1)
        return self.unit_by_unit(mixture, weights)  # of (hidden, experts, columns)

    def output(self, block: Any, consumer: Any) -> nn.Module:
        """The block, which adds what the shared experts put out."""
        return block

    def passed_on(self, block: Any) -> tuple[Tensor, int]:
        """The up projections of all experts, each as strong as a share of the tokens is large."""
        mixture = mixture_of(block)
        up = getattr(block.experts, mixture.up)
        up = up.transpose(1, 2) if mixture.transposed else up  # (experts, channels, hidden)
        if mixture.interleaved:
            up = up[:, 1::2]
        up = up[:, -mixture.width :]
        if mixture.biased:
            up = torch.cat([up, torch.zeros_like(up[:, :1])], 1)
        share = min(1.0, mixture.top_k / mixture.count)
        return self.unit_by_unit(mixture, up.permute(2, 0, 1)).T * share, 1

    def unit_by_unit(self, mixture: Mixture, values: Tensor) -> Tensor:
        """(rows, experts, columns) as (rows, columns of all units), one unit after the other."""
        raise NotImplementedError

    def check_rest(self, block: Any, name: str, width: int) -> None:
        """Beside the experts only the router, with an entry for each of them, and what every token
        passes may stand.
        """
        mixture = mixture_of(block)
        known = {part.parameter.removeprefix(f"{name}.") for part in _experts(mixture, name)}
        for part, tensor in (*block.named_parameters(), *block.named_buffers()):
            if part not in known and part.partition(".")[0] not in mixture.shared():
                raise UnsupportedModelError(
                    f"{name}.{part} has shape {tuple(tensor.shape)}: it is not known what it is to "
                    f"the {mixture.count} experts."
                )

    def config(self, block: Any, columns: int, width: int, named: Any) -> dict[str, int]:
        """Number of experts, and of the channels of each."""
        mixture = mixture_of(block)
        sizes = {EXPERT_COUNTS: mixture.count, EXPERT_WIDTHS: mixture.width}
        return {_field(named, fields): size for fields, size in sizes.items()}

    def field(self, config: Any, name: str) -> str:
        """Fields are called as in `config`."""
        return name

    def named(self, config: Any) -> str:
        """The field of a configuration that holds the number of units of all layers."""
        return _field(config, self.fields)

    def common_width(self, config: Any, tower: str) -> int | None:
        """In the field that the configuration has for it."""
        size = common_value(config, self.named(config))
        return size if isinstance(size, int) else None

    def configured_width(self, config: Any, block: Any, columns: int) -> int:
        """See `common_width`."""
        return getattr(config, self.named(config))

    def set_common_width(self, config: Any, tower: str, width: int) -> None:
        """In the field that the configuration has for it."""
        setattr(config, self.named(config), width)

    def resize(self, block: Any, columns: int, width: int) -> None:
        """Of the block, its experts and its router."""
        mixture = mixture_of(block)
        for module in (block, mixture.experts, getattr(block, mixture.router)):
            super().resize(module, columns, width)

    def skip(self, block: Any) -> Skip:
        """A module that returns what the decoder layer unpacks."""
        skip = SkipMixture if type(block).__name__ in ROUTED_WITH_LOGITS else Skip
        return skip(Experts.name, block)


class Experts(_Mixtures):
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
        return _experts(mixture_of(block), name)

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


class ExpertChannels(_Mixtures):
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


class SkipMixture(Skip):
    """A dropped mixture whose decoder layer expects the router's scores beside its outputs."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """(zeros of the shape of `hidden_states`, no scores)."""
        return super().forward(hidden_states), None


def mixture_of(block: nn.Module) -> Mixture:
    """The mixture in a block that has one."""
    found = Mixture.of(block)
    assert found is not None, type(block)
    return found


def _experts(mixture: Mixture, name: str) -> tuple[Slice, ...]:
    """What an expert owns."""
    names = (mixture.up, f"{mixture.up}_bias", "down_proj_bias", "down_proj")
    there = [n for n in names if n in mixture.experts._parameters]
    return (
        *(Slice(parameter=f"{name}.{n}", dim=dim, size=1) for n, dim in mixture.routed.items()),
        *(Slice(parameter=f"{name}.{EXPERTS}.{n}", dim=0, size=1) for n in there),
    )


def _field(config: Any, fields: tuple[str, ...]) -> str:
    """The configuration's own name of the first of some fields that it has."""
    name = next((n for n in fields if isinstance(common_value(config, n), int)), fields[0])
    return config.attribute_map.get(name, name)
