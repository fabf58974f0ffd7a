"""What units own of parameters, and how a parameter changes with the units it is left with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Slice:
    """What every unit of a group owns of one parameter.

    Unit u owns the entries start + u * size to start + (u + 1) * size - 1 along `dim`. Several
    slices of a group may lie in one parameter: those of fused projections. Entries that no slice
    covers belong to nobody, and stay.

    Attributes:
        parameter: name of the parameter in the model.
        dim: dimension of the parameter along which the units lie: in the weight of a linear layer
            that of its outputs (rows, which compute the unit) or of its inputs (columns, which read
            it), see `hipp_ext.projections`.
        size: entries of one unit.
        start: first entry of the first unit.
        linear: whether the parameter is the weight or bias of a linear layer, and not that of a
            norm or an attention sink.
    """

    parameter: str
    dim: int
    size: int
    start: int = 0
    linear: bool = True

    @property
    def layer(self) -> str:
        """Name of the module that holds the parameter."""
        return self.parameter.rpartition(".")[0]


# The entries of all units of a slice, and the slice -> those that take their place.
Change = Callable[[Tensor, Slice], Tensor]


def change_units(values: Tensor, slices: Sequence[Slice], width: int, change: Change) -> Tensor:
    """A parameter of `width` units after `change`; what belongs to nobody stays as it is.

    A view where one slice covers the parameter and `change` returns a view.

    Args:
        values: the parameter, or its gradient.
        slices: all slices of one group in this parameter, along one dimension.
        width: number of units now.
        change: called with the entries of all units of each slice.
    """
    dim, pieces, at = slices[0].dim, [], 0
    for part in sorted(slices, key=lambda s: s.start):
        pieces.append(values.narrow(dim, at, part.start - at))
        owned = values.narrow(dim, part.start, width * part.size)
        pieces.append(change(owned, part))
        at = part.start + width * part.size
    pieces.append(values.narrow(dim, at, values.shape[dim] - at))
    filled = [piece for piece in pieces if piece.shape[dim]]
    return filled[0] if len(filled) == 1 else torch.cat(filled, dim)


def first_units(count: int, sections: int) -> Change:
    """The first `count` of all units, the same number of every section; views of one section."""
    return lambda owned, part: _narrowed(owned, part, sections, 0, count // sections)


def without_first(sections: int) -> Change:
    """All units but the first of every section."""
    return lambda owned, part: _narrowed(owned, part, sections, 1, None)


def chosen_units(units: Tensor) -> Change:
    """The units of these numbers, in their order; copies.

    As blocks of whole units: copying a head at once is several times faster than copying its
    columns.
    """

    def choose(owned: Tensor, part: Slice) -> Tensor:
        blocks = owned.unflatten(part.dim, (-1, part.size))
        taken = blocks.index_select(part.dim, units.to(owned.device))
        return taken.flatten(part.dim, part.dim + 1)

    return choose


def padded_units(width: int, sections: int) -> Change:
    """The old units, and zeros behind those of each section, `width` units in all."""

    def pad(owned: Tensor, part: Slice) -> Tensor:
        dim = part.dim
        before = owned.unflatten(dim, (sections, -1))
        shape = list(before.shape)
        shape[dim + 1] = width * part.size // sections
        new = owned.new_zeros(shape)
        new.narrow(dim + 1, 0, before.shape[dim + 1]).copy_(before)
        return new.flatten(dim, dim + 1)

    return pad


def _narrowed(owned: Tensor, part: Slice, sections: int, first: int, count: int | None) -> Tensor:
    """`count` units of every section from its unit number `first` on; None: all further ones."""
    dim = part.dim
    blocks = owned.unflatten(dim, (sections, -1))
    start = first * part.size
    length = blocks.shape[dim + 1] - start if count is None else count * part.size
    return blocks.narrow(dim + 1, start, length).flatten(dim, dim + 1)


def shape_in(module: nn.Module, name: str) -> tuple[int, ...]:
    """Shape of a parameter or buffer of a module; of packed weights that of what they stand for."""
    owner, _, attribute = name.rpartition(".")
    layer = module.get_submodule(owner)
    if isinstance(layer, nn.Linear) and attribute == "weight":
        return layer.out_features, layer.in_features
    return tuple(tensor_in(module, name).shape)


def tensor_in(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of a module or of its parts."""
    owner, _, attribute = name.rpartition(".")
    return tensors_of(module.get_submodule(owner), attribute)[attribute]


def tensors_of(module: nn.Module, name: str) -> dict[str, Any]:
    """The dict in which a module keeps a parameter or buffer of its own."""
    return module._parameters if name in module._parameters else module._buffers
