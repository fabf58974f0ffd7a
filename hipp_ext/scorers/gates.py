"""Gates on the units of groups: a factor on every unit, wherever it is read."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hipp_ext.errors import CalibrationError
from hipp_ext.groups import Group, watching
from hipp_ext.kinds import Look
from hipp_ext.modes import training_only

Loss = Callable[[nn.Module, Any], Float[Tensor, ""]]  # (model, batch) -> mean loss


@dataclass(frozen=True, kw_only=True, eq=False)
class Consumer:
    """A layer that reads units of a group.

    Attributes:
        layer: name of a convolution or linear layer.
        units: for each of its input channels the unit that it belongs to; -1: another group's.
    """

    layer: str
    units: Int[Tensor, " channels"]


@dataclass(frozen=True, kw_only=True, eq=False)
class GatedGroup:
    """Units that are scored together, in a language tower or in a network of convolutions.

    Attributes:
        name: name of the group.
        width: number of units.
        producers: names of the layers whose weights produce the units.
        consumers: all layers that read the units. A unit is removed from the inputs of all of them.
        producer_units: per producer, for each of its output channels the unit that it belongs to,
            or -1. They may be empty where the group has consumers.
        sections: equal sections of the units that keep the same number each, see `Group.sections`.
        source: the group of a transformers model, whose kind knows where its units are read.
    """

    name: str
    width: int
    producers: tuple[str, ...]
    consumers: tuple[Consumer, ...]
    producer_units: tuple[Tensor, ...] = ()
    sections: int = 1
    source: Group | None = None

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the producers' weights."""
        if self.source is not None:
            return self.source.producing
        return tuple(f"{name}.weight" for name in self.producers)


def gated_group(group: Group) -> GatedGroup:
    """A group of a transformers model as one whose units can be gated."""
    units = torch.arange(group.width).repeat_interleave(group.inputs)
    return GatedGroup(
        name=group.name,
        width=group.width,
        producers=group.producers,
        consumers=(Consumer(layer=group.consumer, units=units),),
        sections=group.sections,
        source=group,
    )


@contextlib.contextmanager
def gated(
    model: nn.Module, groups: Sequence[GatedGroup], gates: Sequence[Tensor]
) -> Iterator[None]:
    """Inside the block every unit is multiplied by its gate wherever it is read.

    Units that no layer reads are multiplied where they are produced.
    """
    with contextlib.ExitStack() as stack:
        for group, gate in zip(groups, gates, strict=True):
            if group.source is not None:
                close = _gate_inputs(group.source, gate)
                stack.enter_context(watching(model, group.source, close))
                continue
            for consumer in group.consumers:
                layer = model.get_submodule(consumer.layer)
                hook = _before(_gate(layer, consumer.units, gate))
                stack.callback(layer.register_forward_pre_hook(hook).remove)
            if not group.consumers:
                for name, units in zip(group.producers, group.producer_units, strict=True):
                    layer = model.get_submodule(name)
                    hook = _after(_gate(layer, units, gate))
                    stack.callback(layer.register_forward_hook(hook).remove)
        yield


def unit_taylor(
    model: nn.Module, groups: Sequence[GatedGroup], loss: Loss, batches: Sequence[Any]
) -> list[Tensor]:
    """Per group (width,) scores: root mean square over batches of the loss's gate derivatives.

    A gate stands where its unit is read, on all consumers at once, so that it closes exactly what
    pruning removes.

    Raises:
        CalibrationError: there are no batches.

    Source: Molchanov et al. (arXiv 1906.10771), eq. 8.
    Differs from the paper: squares are averaged over batches, not examples.
    """
    if not len(batches):
        raise CalibrationError("Taylor scores need at least one batch.")
    device = next(model.parameters()).device
    gates = [torch.ones(g.width, device=device, requires_grad=True) for g in groups]
    squares = [torch.zeros(g.width, dtype=torch.float64) for g in groups]
    with training_only(model, []), gated(model, groups, gates), torch.enable_grad():
        for batch in batches:
            gradients = torch.autograd.grad(loss(model, batch), gates, materialize_grads=True)
            for square, gradient in zip(squares, gradients, strict=True):
                square += gradient.double().square().cpu()
    return [(s / len(batches)).sqrt() for s in squares]


def _gate_inputs(group: Group, gate: Tensor) -> Look:
    """Multiplies what reads the units by their gates."""

    def close(x: Tensor, _: Tensor | None, part: slice) -> Tensor:
        # Built at every call, because a gate may need its gradient after each of them.
        return x * gate.to(x.device).repeat_interleave(group.inputs)[part].to(x.dtype)

    return close


def _before(close: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple], tuple]:
    return lambda _, args: (close(args[0]), *args[1:])


def _after(close: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    return lambda _, __, output: close(output)


def _gate(layer: nn.Module, units: Tensor, gate: Tensor) -> Callable[[Tensor], Tensor]:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    units = units.to(weight.device)
    shape = (-1,) if isinstance(layer, nn.Linear) else (-1, *[1] * (weight.dim() - 2))

    def close(x: Tensor) -> Tensor:
        # Built at every call, because a gate may need its gradient after each of them. The last
        # entry is for units -1, which are left as they are.
        padded = torch.cat([gate.to(weight.device), torch.ones(1, device=weight.device)])
        return x * padded[units].to(weight.dtype).view(shape)

    return close
