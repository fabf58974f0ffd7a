"""Groups of units, as data: what goes together, and what one unit costs."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from hipp_ext.kinds import KINDS, Kind, Slice
from hipp_ext.towers import Tower

AttentionUnit = Literal["kv", "query"]  # KV groups, or query heads
ExpertUnit = Literal["expert", "channel"]  # experts, or channels of all experts of a layer
Partial = Literal["refuse", "report"]  # what is done about parts that can only stay whole


@dataclass(frozen=True, kw_only=True)
class LeftWhole:
    """A part of a layer that no group has units of: it stays as it is.

    Attributes:
        module: name of the module.
        type: its class.
        reason: why it cannot be divided into units.
    """

    module: str
    type: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """Units that a plan chooses among.

    Attributes:
        tower: "language", "vision" or "projector" (the MLP between the two).
        layer: index of the layer in its tower, from 0; of the projector's MLPs, one after another.
        kind: a key of KINDS: "attention" (unit: a KV group), "query_heads" (unit: a query head of
            the same block), "latent_attention" (unit: a head), "ffn" (unit: a channel), "experts"
            (unit: an expert), "expert_channels" (unit: a channel of all experts of the block).
        width: number of units.
        owns: what one unit owns: the rows that compute it, then the columns that read it.
        buffers: what one unit owns of buffers: an expert has entries of its router's corrections.
        unit_parameters: parameters that leave with one unit, biases included.
        unit_flops: floating-point operations per token that leave with one unit (two per
            multiply-accumulate of its weights); attention over the context comes on top, see
            `context_flops`.
        unit_active: parameters that compute for a token and leave with one unit; 0: all of the
            unit's. In a mixture of experts a token meets few of the experts, and others instead of
            those that left.
        inputs: inputs of the consumer that belong to one unit, side by side; 0: its columns.
        least: the smallest keep count, apart from 0, with which the block works: every token is
            sent to so many experts. At least one unit of every section.
        sections: the units lie in so many equal sections, one after the other, and every section
            keeps the same number of units: query heads in one section per KV group, which must all
            be shared by equally many. Other units are free (1).
        stock_counts: keep counts that the model's configuration can name for all layers alike, so
            that stock transformers builds such a model; None: any count.
        removable: whether stock transformers builds the model without this layer.
        droppable: whether the model works without this block.
        picture_tokens: how many tokens of a picture pass the units; 0: the tokens of a prompt do.
    """

    tower: Tower
    layer: int
    kind: Kind
    width: int
    owns: tuple[Slice, ...]
    unit_parameters: int
    unit_flops: int
    buffers: tuple[Slice, ...] = ()
    unit_active: int = 0
    inputs: int = 0
    least: int = 1
    sections: int = 1
    stock_counts: tuple[int, ...] | None = None
    removable: bool = True
    droppable: bool = True
    picture_tokens: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit_active", self.unit_active or self.unit_parameters)
        object.__setattr__(self, "inputs", self.inputs or (self.columns if self.owns else 0))

    @property
    def name(self) -> str:
        """Key of this group in scores, plans and masks, such as "language.3.ffn"."""
        return f"{self.tower}.{self.layer}.{self.kind}"

    @property
    def place(self) -> str:
        """Place of the block in its layer, "attention" or "ffn"; see `hipp_ext.kinds`."""
        return KINDS[self.kind].place

    @functools.cached_property
    def produced(self) -> tuple[Slice, ...]:
        """What units own of the weights of the linear layers that compute them."""
        return tuple(p for p in self.owns[:-1] if p.linear and p.parameter.endswith(".weight"))

    @functools.cached_property
    def producing(self) -> tuple[str, ...]:
        """Names of the weights that compute the units, and of those that route to them."""
        parts = self.produced if self.is_linear else self.owns[:-1]
        return tuple(dict.fromkeys(p.parameter for p in parts if "bias" not in p.parameter))

    @functools.cached_property
    def producers(self) -> tuple[str, ...]:
        """Names of the linear layers whose output rows belong to the units."""
        return tuple(dict.fromkeys(part.layer for part in self.produced))

    @functools.cached_property
    def cuts(self) -> tuple[tuple[Slice, ...], ...]:
        """What units own, parameter by parameter and buffer by buffer: fused projections hold
        several slices.
        """
        found: dict[str, list[Slice]] = {}
        for part in (*self.owns, *self.buffers):
            found.setdefault(part.parameter, []).append(part)
        return tuple(map(tuple, found.values()))

    @functools.cached_property
    def layers(self) -> tuple[str, ...]:
        """Names of the modules that compute the units or read them."""
        return tuple(dict.fromkeys(p.layer for p in (*self.owns, *self.buffers) if p.linear))

    @property
    def is_linear(self) -> bool:
        """Whether linear layers compute and read the units: not so in mixtures of experts."""
        return KINDS[self.kind].linear

    @property
    def consumer(self) -> str:
        """Name of the linear layer that reads the units."""
        return self.owns[-1].layer

    @property
    def columns(self) -> int:
        """Input columns of the consumer that one unit owns."""
        return self.owns[-1].size

    @property
    def block(self) -> str:
        """Name of the module that holds the layers, such as an attention or FFN module."""
        return self.consumer.rpartition(".")[0]

    @property
    def parameters(self) -> int:
        """Parameters of all units together."""
        return self.width * self.unit_parameters

    def context_flops(self, context: int) -> int:
        """FLOPs per token and unit over `context` keys; 0 where units look at no other tokens."""
        return KINDS[self.kind].context_flops(self.owns, context)

    def multiple(self, round_to: int) -> int:
        """Smallest number of units, the same of every section, whose columns together are a
        multiple of `round_to`, where the sizes of matrices depend on the number of units.
        """
        return KINDS[self.kind].multiple(self.columns, round_to, self.sections)


def total_parameters(groups: Iterable[Group]) -> int:
    """Prunable parameters: those of all units of all groups."""
    return sum(g.parameters for g in groups)
