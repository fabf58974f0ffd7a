"""The channels of a classifier as groups: what goes together, and what each channel owns."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.scorers.gates import GatedGroup


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelSlice:
    """The part of a parameter or buffer that the units of a group own.

    Attributes:
        parameter: its name.
        dim: the dimension that is cut.
        sizes: how many entries of that dimension each unit owns.
    """

    parameter: str
    dim: int
    sizes: Int[Tensor, " width"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelGroup(GatedGroup):
    """Channels that go together: output channels of a layer, or of several that are coupled.

    Attributes:
        name: name of the first layer whose output channels are the units. (Where they are reshaped
            into fewer channels, a unit is all those that end in one.)
        norms: parameters of norms whose entries the units own, and the number of entries per unit.
        slices: everything that the units own, of every parameter and buffer.
        obstacle: why the units can be scored and not removed; empty where they can be removed.
    """

    norms: tuple[tuple[str, int], ...] = ()
    slices: tuple[ChannelSlice, ...] = ()
    obstacle: str = ""

    def units_of(self, layer: str, produced: bool) -> Tensor | None:
        """The unit of each output (`produced`) or input channel of `layer`, or None."""
        if produced:
            return dict(zip(self.producers, self.producer_units, strict=True)).get(layer)
        return {c.layer: c.units for c in self.consumers}.get(layer)


def require_removable(groups: Sequence[GatedGroup]) -> None:
    """Raise UnsupportedModelError, naming the layer, where units of a group cannot be removed."""
    for group in groups:
        if isinstance(group, ChannelGroup) and group.obstacle:
            raise UnsupportedModelError(
                f"The channels of {group.name} cannot be removed: {group.obstacle}. "
                f"List {group.name} in ignored."
            )
