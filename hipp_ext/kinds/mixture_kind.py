"""What mixtures of experts have in common in whichever units they are divided.

Experts that every token passes (shared experts) belong to no unit; they leave with a dropped block.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
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
from hipp_ext.kinds.base import BlockKind
from hipp_ext.kinds.mixture import Mixture
from hipp_ext.kinds.skips import Skip, SkipMixture
from hipp_ext.kinds.slices import Slice

_NAMES = replace(
    BLOCKS["ffn"],
    producers=(("a router (gate, router)", EXPERTS),),
    fused={},
    consumers=(EXPERTS,),
    skip="moe",
)


class MixtureKind(BlockKind):
    """What both units of a mixture have in common."""

    place = "ffn"
    names = _NAMES
    linear = False
    found_as: ClassVar[str] = "experts"  # the kind that finds the blocks

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
        known = {part.parameter.removeprefix(f"{name}.") for part in expert_slices(mixture, name)}
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
        return skip(self.found_as, block)


def mixture_of(block: nn.Module) -> Mixture:
    """The mixture in a block that has one."""
    found = Mixture.of(block)
    assert found is not None, type(block)
    return found


def expert_slices(mixture: Mixture, name: str) -> tuple[Slice, ...]:
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
