"""What a kind of block has to say about itself, and what is the same for all of them."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.families import BlockNames


@dataclass(frozen=True, kw_only=True)
class Slice:
    """What every unit of a group owns of one parameter.

    Unit u owns the entries u * size to (u + 1) * size - 1 along `dim`.

    Attributes:
        parameter: name of the parameter in the model.
        dim: 0 for rows (what computes the unit), 1 for columns (what reads it).
        size: rows or columns of one unit.
    """

    parameter: str
    dim: int
    size: int

    @property
    def layer(self) -> str:
        """Name of the linear layer that holds the parameter."""
        return self.parameter.rpartition(".")[0]


class BlockKind(abc.ABC):
    """One prunable kind of block: a kind answers these questions, and nothing else asks what it is.

    A kind's units are read by one linear layer of the block, its consumer; a unit is masked by
    zeroing the consumer's inputs.

    Attributes:
        name: name of the kind in groups, plans and manifests.
        place: place of the block in a layer, a key of `families.BLOCKS`. Every layer has a block in
            both places; two kinds with the same place are alternatives to each other.
        names: what transformers calls the parts of such a block.
        unit: what the units are called, in the plural.
        fields: configuration fields that hold the width of all layers, the decisive one first.
    """

    name: ClassVar[str]
    place: ClassVar[Literal["attention", "ffn"]]
    names: ClassVar[BlockNames]
    unit: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]

    def find(self, layer: nn.Module) -> list[nn.Module]:
        """The blocks of this kind in a layer, dropped ones included: children of the layer."""
        return [
            child
            for child in layer.children()
            if (child.kind == self.name if isinstance(child, Skip) else self.match(child))
        ]

    def match(self, block: nn.Module) -> tuple[list[str], str] | None:
        """(producers, consumer) as child names where `block` has this kind's shape, else None."""
        linear = {n for n, child in block.named_children() if isinstance(child, nn.Linear)}
        known = {name for names in self.names.producers for name in names}
        producers = tuple(n for n, _ in block.named_children() if n in linear & known)
        consumers = [n for n in self.names.consumers if n in linear]
        for names in self.names.producers:
            if set(names) == set(producers) and len(consumers) == 1:
                return list(names), consumers[0]
        return None

    def owns(self, block: nn.Module, name: str, width: int) -> tuple[Slice, ...]:
        """What one of `width` units owns; the consumer's columns come last.

        Raises:
            UnsupportedModelError: the units do not divide the block's linear layers.
        """
        matched = self.match(block)
        assert matched is not None
        producers, consumer = matched
        sizes = [(p, getattr(block, p).out_features) for p in producers]
        sizes.append((consumer, getattr(block, consumer).in_features))
        if any(size % width for _, size in sizes) or not self.passes_on(block):
            listed = ", ".join(
                f"{name}.{n} {getattr(block, n).in_features}->{getattr(block, n).out_features}"
                for n in (*producers, consumer)
            )
            raise UnsupportedModelError(
                f"{name}: {width} units do not divide its linear layers: {listed}"
            )
        rows = [
            Slice(parameter=f"{name}.{p}.{part}", dim=0, size=size // width)
            for p, size in sizes[:-1]
            for part in ("weight", "bias")
            if part == "weight" or getattr(block, p).bias is not None
        ]
        columns = Slice(parameter=f"{name}.{consumer}.weight", dim=1, size=sizes[-1][1] // width)
        return (*rows, columns)

    def passes_on(self, block: Any) -> bool:
        """Whether the consumer reads as many numbers as the producers make of the units."""
        return True

    def sections(self, block: Any) -> int:
        """Number of equal sections of the units, of which all must keep the same number."""
        return 1

    @abc.abstractmethod
    def width(self, block: Any, name: str) -> int:
        """Number of units of a block. Raises UnsupportedModelError where it cannot be told."""

    @abc.abstractmethod
    def check_rest(self, block: Any, name: str, width: int) -> None:
        """Raise UnsupportedModelError where other parameters of the block may belong to units."""

    def context_flops(self, owns: tuple[Slice, ...], context: int) -> int:
        """FLOPs per token and unit that grow with the number of keys; `owns`: of one unit."""
        return 0

    def attributes(self, block: Any, columns: int, width: int) -> Mapping[str, int]:
        """Size attributes of the block when it has `width` units of `columns` columns each."""
        return {}

    def config(self, block: Any, columns: int, width: int) -> Mapping[str, int]:
        """What the configuration of a layer says of a block with `width` units."""
        return {self.fields[0]: width}

    def configured_width(self, config: Any, block: Any, columns: int) -> int:
        """Number of units that a layer's configuration asks for; the reverse of `config`."""
        return getattr(config, self.fields[0])

    def common_width(self, config: Any, tower: str) -> int | None:
        """Number of units that the configuration of a tower names for all layers, if it does."""
        sizes = [getattr(config, field, None) for field in self.fields]
        return next((size for size in sizes if isinstance(size, int)), None)

    def stock_counts(
        self, config: Any, tower: str, common: int, block: Any, columns: int
    ) -> tuple[int, ...] | None:
        """Numbers of units that the configuration of a tower can name for all layers, ascending.

        None: any number.

        Args:
            config: configuration of the tower.
            tower: "language" or "vision".
            common: the number that it names now, which is the last of the result.
            block: a block of the tower.
            columns: columns of one unit.
        """
        return None

    def set_common_width(self, config: Any, tower: str, width: int) -> None:
        """Have the configuration of a tower name `width` units for all layers."""
        setattr(config, self.fields[0], width)

    def skip(self, block: Any) -> "Skip":
        """What stands in a dropped block's place."""
        return Skip(self.name, block)

    def resize(self, block: Any, owns: tuple[Slice, ...], width: int) -> None:
        """Bring the size attributes of a block and its linear layers in line with `width` units."""
        for part in owns:
            layer = getattr(block, part.layer.rpartition(".")[2])
            setattr(layer, ("out_features", "in_features")[part.dim], width * part.size)
        for attribute, size in self.attributes(block, owns[-1].size, width).items():
            if isinstance(getattr(block, attribute, None), int):
                setattr(block, attribute, size)


class Skip(nn.Module):
    """A dropped block: adds nothing to the residual stream, computes nothing, has no parameters.

    Args:
        kind: name of the kind of the block.
        block: the block that is dropped. Its plain attributes (layer_idx, is_sliding, ...) are
            kept, because some decoder layers read them.
    """

    def __init__(self, kind: str, block: nn.Module):
        super().__init__()
        self.kind = kind
        plain = (bool, int, float, str, type(None))
        self.__dict__.update(
            {k: v for k, v in vars(block).items() if isinstance(v, plain) and k[0] != "_"}
        )
        self.training = block.training

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        """Zeros of the shape of `hidden_states`, without memory of their own."""
        return hidden_states.new_zeros(()).expand_as(hidden_states)
