"""What a kind of block has to say about itself, and what is the same for all of them."""

import abc
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal

from jaxtyping import Bool
from torch import Tensor, nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.families import ROUNDING, BlockNames, common_value, field_name
from hipp_ext.kinds.skips import Skip
from hipp_ext.kinds.slices import Slice
from hipp_ext.projections import inputs_of, is_projection, matrix_of, output_dim, outputs_of

# (inputs of a consumer (..., inputs), the tokens of the block's call that they belong to, which of
# the consumer's inputs they are) -> what takes their place, None: they stay. The tokens are None
# where all are there, in order.
Look = Callable[[Tensor, Tensor | None, slice], Tensor | None]


class BlockKind(abc.ABC):
    """One prunable kind of block: a kind answers these questions, and nothing else asks what it is.

    A kind's units are read by one linear layer of the block, its consumer, whose inputs are watched
    and changed by `watch`. A unit is masked by zeroing its inputs, where `mask` says nothing else.

    Attributes:
        name: name of the kind in groups, plans and manifests.
        place: place of the block in a layer, a key of `families.BLOCKS`. Every layer has a block in
            both places; two kinds with the same place are alternatives to each other.
        names: what transformers calls the parts of such a block.
        unit: what the units are called, in the plural.
        fields: configuration fields that hold the width of all layers, the decisive one first.
        linear: whether linear layers compute and read the units.
        neutral_zeros: whether a unit whose parameters are all zero changes nothing.
    """

    name: ClassVar[str]
    place: ClassVar[Literal["attention", "ffn"]]
    names: ClassVar[BlockNames]
    unit: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    linear: ClassVar[bool] = True
    neutral_zeros: ClassVar[bool] = True

    def find(self, layer: nn.Module) -> list[nn.Module]:
        """The blocks of this kind in a layer, dropped ones included: children of the layer."""
        return [
            child
            for child in layer.children()
            if (child.kind == self.name if isinstance(child, Skip) else self.match(child))
        ]

    def match(self, block: nn.Module) -> tuple[list[str], str] | None:
        """(producers, consumer) as child names where `block` has this kind's shape, else None."""
        linear = {n for n, child in block.named_children() if is_projection(child)}
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
        producers, consumer = self.matched(block)
        gates = [n for n in self.names.gates if is_projection(getattr(block, n, None))]
        names = [n for n in (*producers, *gates) if n != consumer]
        layers = {n: block.get_submodule(n) for n in (*names, consumer)}
        sizes = {n: self.parts(block, n, width) for n in names}
        columns, rest = divmod(inputs_of(layers[consumer]), width)
        if rest or any(sum(p) * width != outputs_of(layers[n]) for n, p in sizes.items()):
            listed = ", ".join(
                f"{name}.{n} {inputs_of(layer)}->{outputs_of(layer)}" for n, layer in layers.items()
            )
            raise UnsupportedModelError(
                f"{name}: {width} units do not divide its linear layers: {listed}"
            )
        rows = [
            Slice(parameter=f"{name}.{n}.{part}", dim=dim, size=size, start=width * sum(before))
            for n, parts in sizes.items()
            for part, dim in (("weight", output_dim(layers[n])), ("bias", 0))
            if part == "weight" or layers[n].bias is not None
            for size, before in ((size, parts[:i]) for i, size in enumerate(parts))
        ]
        dim = 1 - output_dim(layers[consumer])
        read = Slice(parameter=f"{name}.{consumer}.weight", dim=dim, size=columns)
        return (*rows, *self.extras(block, name, width), read)

    def matched(self, block: nn.Module) -> tuple[list[str], str]:
        """(producers, consumer) of a block that has this kind's shape; see `match`."""
        found = self.match(block)
        assert found is not None, type(block)
        return found

    def parts(self, block: Any, layer: str, width: int) -> list[int]:
        """Rows of one unit in each of the projections that lie one after the other in a layer."""
        return [outputs_of(getattr(block, layer)) // width]

    def extras(self, block: Any, name: str, width: int) -> tuple[Slice, ...]:
        """What units own of parameters that belong to no linear layer: sinks, norms per head."""
        return ()

    @abc.abstractmethod
    def passed_on(self, block: Any) -> tuple[Tensor, int]:
        """Weight whose outputs, gates and softmax apart, the consumer reads; and its rows that lie
        side by side in what is read.
        """

    def droppable(self, block: Any) -> bool:
        """Whether the model works without the block."""
        return True

    def divides(self, block: Any) -> bool:
        """Whether a block of this place can be divided into these units."""
        return True

    def sections(self, block: Any) -> int:
        """Number of equal sections of the units, of which all must keep the same number."""
        return 1

    def least(self, block: Any) -> int:
        """The smallest number of units with which the block works."""
        return self.sections(block)

    def multiple(self, columns: int, round_to: int, sections: int) -> int:
        """Smallest number of units, the same of every section, whose columns together are a
        multiple of `round_to`.
        """
        return math.lcm(round_to // math.gcd(round_to, columns), sections)

    def inputs(self, block: Any, owns: tuple[Slice, ...]) -> int:
        """Inputs of the consumer that belong to one unit."""
        return owns[-1].size

    def active_share(self, block: Any, part: Slice) -> float:
        """The part of the entries of `part` that one token is multiplied by, on average, less what
        others are multiplied by instead when the unit is gone.
        """
        return 1.0

    def reading_weight(self, block: Any, consumer: Any) -> Tensor:
        """Weight (outputs, inputs of all units) of the linear layer that reads the units."""
        return matrix_of(consumer)

    @contextlib.contextmanager
    def watch(self, block: Any, consumer: Any, look: Look) -> Iterator[None]:
        """Inside the `with` block `look` sees the inputs of the consumer, and may change them."""

        def hook(_: nn.Module, args: tuple) -> tuple | None:
            found = look(args[0], None, slice(None))
            return None if found is None else (found, *args[1:])

        with consumer.register_forward_pre_hook(hook):
            yield

    def mask(
        self, block: Any, consumer: Any, inputs: int, mask: Bool[Tensor, " width"]
    ) -> contextlib.AbstractContextManager[None]:
        """Inside the `with` block the block computes as if it had only the units of `mask`."""
        columns = mask.to(next(block.parameters()).device).repeat_interleave(inputs)
        return self.watch(block, consumer, lambda x, _, part: x * columns[part].to(x))

    def output(self, block: Any, consumer: Any) -> nn.Module:
        """The module whose output is what the block adds."""
        return consumer

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

    def config(self, block: Any, columns: int, width: int, named: Any) -> Mapping[str, int]:
        """What the configuration of a layer says of a block with `width` units.

        Args:
            block: the block.
            columns: columns of one unit.
            width: number of units.
            named: configuration of the tower, for the names of its fields.
        """
        return {self.fields[0]: width}

    def field(self, config: Any, name: str) -> str:
        """What a configuration calls one of the kind's fields; empty if it has no such field."""
        return field_name(config, name)

    def named(self, config: Any) -> str:
        """The field of a configuration that holds the number of units of all layers."""
        return self.field(config, self.fields[0])

    def configured_width(self, config: Any, block: Any, columns: int) -> int:
        """Number of units that a layer's configuration asks for; the reverse of `config`."""
        return getattr(config, field_name(config, self.fields[0]))

    def common_width(self, config: Any, tower: str) -> int | None:
        """Number of units that the configuration of a tower names for all layers, if it does."""
        names = [n for field in self.fields if (n := field_name(config, field))]
        sizes = [common_value(config, name) for name in names]
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
        name = field_name(config, self.fields[0]) or self.fields[0]
        before = getattr(config, name, None)
        setattr(config, name, [width] * len(before) if isinstance(before, list) else width)
        for name in ROUNDING:
            if hasattr(config, name):
                setattr(config, name, False)

    def skip(self, block: Any) -> Skip:
        """What stands in a dropped block's place."""
        return Skip(self.name, block)

    def resize(self, block: Any, columns: int, width: int) -> None:
        """Bring the size attributes of a block in line with `width` units of `columns` columns."""
        for attribute, size in self.attributes(block, columns, width).items():
            if isinstance(getattr(block, attribute, None), int):
                setattr(block, attribute, size)
