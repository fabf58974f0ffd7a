"""How a loss answers to one module at a time: its weights shaken, its units removed, its units' gates. Any model, any loss.

A module is what is pruned together: a group of a language tower, or convolutions whose channels are coupled. `MRS`
(scorers/mrs.py) uses these with the loss on adversarial inputs; on clean inputs the same functions give the plain
sensitivities to compare with.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hipp_ext.errors import CalibrationError, UnsupportedModelError
from hipp_ext.units import unit_order

Loss = Callable[[nn.Module, Any], Float[Tensor, ""]]  # (model, batch) -> mean loss
REMOVAL_FLOOR = 0.01  # of a measured rise: below it noise decides


@dataclass(frozen=True, kw_only=True, eq=False)
class Reader:
    """A layer that reads units of a module.

    Attributes:
        layer: name of a conv or linear layer.
        units: for each of its input channels the unit it belongs to, or -1 where it belongs to another module.
    """

    layer: str
    units: Int[Tensor, " channels"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Module:
    """Units that are scored together.

    Attributes:
        name: of the module.
        width: number of units.
        weights: names of the parameters that produce the units.
        readers: all layers that read them; a unit is removed by taking it out of all their inputs.
    """

    name: str
    width: int
    weights: tuple[str, ...]
    readers: tuple[Reader, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Share:
    """What of a parameter or buffer goes with the units of a module.

    Attributes:
        parameter: its name.
        dim: the dimension that is cut.
        entries: how many entries of that dimension go with each unit.
    """

    parameter: str
    dim: int
    entries: Int[Tensor, " width"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelGroup(Module):
    """Channels that go together: one output channel of a layer, or of several that a residual stream couples.

    Attributes:
        name: of the first layer whose output channels are the units. (Where they are reshaped into fewer channels, a unit is
            all those that end in one.)
        owners: for every tensor of `weights`, in order, the unit that each output channel of its layer belongs to, or -1.
        followers: parameters of norms that go along, and how many entries of them with one unit.
        shares: all that goes along, of every parameter and buffer.
        obstacle: why the units can be scored and not be removed, in words; empty where they can.
    """

    owners: tuple[Tensor, ...]
    followers: tuple[tuple[str, int], ...] = ()
    shares: tuple[Share, ...] = ()
    obstacle: str = ""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that produce the units."""
        return tuple(w.removesuffix(".weight") for w in self.weights)

    def units_of(self, layer: str, produced: bool) -> Tensor | None:
        """The unit of each output channel (`produced`) or input channel of `layer`; None where the layer has none of them."""
        if produced:
            return dict(zip(self.layers, self.owners, strict=True)).get(layer)
        return {r.layer: r.units for r in self.readers}.get(layer)


def require_removable(modules: Sequence[Module]) -> None:
    """Raise UnsupportedModelError, naming the layer, where units of a module cannot be removed."""
    for module in modules:
        if isinstance(module, ChannelGroup) and module.obstacle:
            raise UnsupportedModelError(
                f"The channels of {module.name} cannot be removed: {module.obstacle}. List {module.name} in ignored."
            )


def worst_case(
    model: nn.Module,
    modules: Sequence[Module],
    loss: Loss,
    batches: Sequence[Any],
    *,
    rho: float = 0.1,
    steps: int = 10,
    stochastic: bool = False,
) -> list[float]:
    """Per module, how far the loss rises when its weights move by at most `rho` of their norm, tensor by tensor.

    Ascent along the gradient normalised per tensor, steps of 2 rho ||W|| / `steps`, projected on the ball; the greatest rise
    seen. Divided by the number of tensors, as several that climb together climb further.

    Args:
        stochastic: every step looks at one batch, in turn, and the rise is that at the end, on every other batch.

    Cost: about `steps` forward and backward passes over `batches` for every module; stochastic, with as many batches as steps,
    one such pass and half a forward pass.

    Source: module robust criticality, Zhu et al. (arXiv 2308.02533), eq. 2 and algorithm 1.
    Differs from the paper: normalised gradients instead of SGD with rate 1, the maximum over steps, division by the number of
    tensors.
    """
    judged = batches[::2] if stochastic else batches
    start, rises = _mean_loss(model, loss, judged), []
    for module in modules:
        tensors = [model.get_parameter(name) for name in module.weights]
        original = [p.detach().clone() for p in tensors]
        # float32, so that small steps add up in half precision too.
        moved = [torch.zeros_like(p, dtype=torch.float32) for p in tensors]
        radii = [rho * float(p.detach().float().norm()) for p in tensors]
        best = 0.0
        try:
            with _training_only(model, tensors):
                for step in range(steps):
                    here = [batches[step % len(batches)]] if stochastic else batches
                    value, gradients = _loss_and_gradients(model, loss, here, tensors)
                    if not stochastic:
                        best = max(value - start, best)  # in this order NaN stays NaN
                    for p, old, delta, gradient, radius in zip(
                        tensors, original, moved, gradients, radii, strict=True
                    ):
                        delta += 2 * radius / steps * gradient / gradient.norm().clamp_min(1e-30)
                        delta *= min(1.0, radius / max(float(delta.norm()), 1e-30))
                        p.data.copy_(old.float() + delta)
                best = max(_mean_loss(model, loss, judged) - start, best)
        finally:
            for p, old in zip(tensors, original, strict=True):
                p.data.copy_(old)
        rises.append(best / len(tensors))
    return rises


def first_order(
    model: nn.Module,
    modules: Sequence[Module],
    loss: Loss,
    batches: Sequence[Any],
    *,
    rho: float = 0.1,
) -> list[float]:
    """Per module, `worst_case` to first order: rho times the mean over its tensors of ||W|| ||dL/dW||.

    Cost: one forward and backward pass over `batches` for all modules together.
    """
    names = list(dict.fromkeys(name for module in modules for name in module.weights))
    tensors = [model.get_parameter(name) for name in names]
    with _training_only(model, tensors):
        _, gradients = _loss_and_gradients(model, loss, batches, tensors)
    norms = {
        n: float(p.detach().float().norm() * g.norm())
        for n, p, g in zip(names, tensors, gradients, strict=True)
    }
    return [rho * sum(norms[n] for n in module.weights) / len(module.weights) for module in modules]


def removal(
    model: nn.Module,
    modules: Sequence[Module],
    loss: Loss,
    batches: Sequence[Any],
    ranking: Sequence[Tensor],
    *,
    ratio: float = 0.5,
) -> list[float]:
    """Per module, how far the loss rises when its lowest-ranked units are removed, the others being whole; REMOVAL_FLOOR at
    least.

    Cost: one forward pass over `batches` for every module.

    Args:
        ranking: per module one score per unit, higher = stays longer.
        ratio: share of the units removed; one at least, and one at least stays.
    """
    start, rises = _mean_loss(model, loss, batches), []
    for module, scores in zip(modules, ranking, strict=True):
        mask = removal_mask(scores, ratio)
        with gated(model, [module], [mask]):
            rises.append(max(_mean_loss(model, loss, batches) - start, REMOVAL_FLOOR))
    return rises


def unit_taylor(
    model: nn.Module, modules: Sequence[Module], loss: Loss, batches: Sequence[Any]
) -> list[Tensor]:
    """Per module (width,) scores: root mean square over batches of the loss's derivative with respect to a gate on the unit.

    The gate stands where the unit is read, on all readers at once, so that it closes exactly what pruning removes.

    Source: Molchanov et al. (arXiv 1906.10771), eq. 8.
    Differs from the paper: squares are averaged over batches, not examples.
    """
    device = next(model.parameters()).device
    gates = [torch.ones(m.width, device=device, requires_grad=True) for m in modules]
    squares = [torch.zeros(m.width, dtype=torch.float64) for m in modules]
    with _training_only(model, []), gated(model, modules, gates), torch.enable_grad():
        for batch in batches:
            gradients = torch.autograd.grad(loss(model, batch), gates, materialize_grads=True)
            for square, gradient in zip(squares, gradients, strict=True):
                square += gradient.double().square().cpu()
    return [(s / len(batches)).sqrt() for s in squares]


def unit_norms(
    model: nn.Module, modules: Sequence[Module], rows: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    """Per module (width,): the L1 norm of a unit's weights, each producing tensor scaled to sum to one.

    Args:
        rows: per module and producing tensor, the unit that each output channel of its layer belongs to, or -1.
    """
    result = []
    for module, owners in zip(modules, rows, strict=True):
        total = torch.zeros(module.width, dtype=torch.float64)
        for name, owner in zip(module.weights, owners, strict=True):
            layer = model.get_submodule(name.rpartition(".")[0])
            norms = (
                _by_output(layer, model.get_parameter(name)).abs().sum(1, dtype=torch.float64).cpu()
            )
            total.index_add_(
                0, owner[owner >= 0], (norms / norms.sum().clamp_min(1e-30))[owner >= 0]
            )
        result.append(total)
    return result


def _by_output(layer: nn.Module, weight: Tensor) -> Tensor:
    """(output channels, all other entries) of a weight; a transposed convolution has its inputs first."""
    weight = weight.detach()
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.transposed:
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def removal_mask(scores: Float[Tensor, " width"], ratio: float) -> Float[Tensor, " width"]:
    """1 for the units that stay when the lowest `ratio` of them go, else 0."""
    width = len(scores)
    keep = width if width == 1 else min(width - 1, max(1, round(width * (1 - ratio))))
    mask = torch.zeros(width)
    mask[unit_order(scores)[:keep]] = 1
    return mask


@contextlib.contextmanager
def gated(model: nn.Module, modules: Sequence[Module], gates: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block every unit is multiplied by its gate wherever it is read; where nothing reads it, as it is made."""
    with contextlib.ExitStack() as stack:
        for module, gate in zip(modules, gates, strict=True):
            for reader in module.readers:
                layer = model.get_submodule(reader.layer)
                stack.callback(
                    layer.register_forward_pre_hook(
                        _before(_gate(layer, reader.units, gate))
                    ).remove
                )
            if isinstance(module, ChannelGroup) and not module.readers:
                for name, owner in zip(module.layers, module.owners, strict=True):
                    layer = model.get_submodule(name)
                    stack.callback(
                        layer.register_forward_hook(_after(_gate(layer, owner, gate))).remove
                    )
        yield


def _before(close: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple], tuple]:
    return lambda _, args: (close(args[0]), *args[1:])


def _after(close: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    return lambda _, __, output: close(output)


def _gate(layer: nn.Module, units: Tensor, gate: Tensor) -> Callable[[Tensor], Tensor]:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    units = units.to(weight.device)
    shape = (-1,) if isinstance(layer, nn.Linear) else (-1, *[1] * (weight.dim() - 2))

    def close(x: Tensor) -> Tensor:
        # Anew at every call: a gate may want its gradient after each of them.
        padded = torch.cat(
            [gate.to(weight.device), torch.ones(1, device=weight.device)]
        )  # -1: another module's, left alone
        return x * padded[units].to(weight.dtype).view(shape)

    return close


@contextlib.contextmanager
def _training_only(model: nn.Module, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block these parameters, and no others, require gradients."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    wanted = {id(t) for t in tensors}
    try:
        for p, _ in flags:
            p.requires_grad_(id(p) in wanted)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def _loss_and_gradients(
    model: nn.Module, loss: Loss, batches: Sequence[Any], tensors: Sequence[Tensor]
) -> tuple[float, list[Tensor]]:
    """Mean over batches of the loss, and of its gradients (float32); `.grad` is left alone."""
    value, total = 0.0, [torch.zeros_like(t, dtype=torch.float32) for t in tensors]
    for batch in batches:
        with torch.enable_grad():
            here = loss(model, batch)
            gradients = torch.autograd.grad(here, tensors, materialize_grads=True)
        value += float(here.detach()) / len(batches)
        for t, gradient in zip(total, gradients, strict=True):
            t += gradient.float() / len(batches)
    return value, total


@torch.no_grad()
def _mean_loss(model: nn.Module, loss: Loss, batches: Sequence[Any]) -> float:
    if not len(batches):
        raise CalibrationError("A sensitivity needs at least one batch.")
    return sum(float(loss(model, batch)) for batch in batches) / len(batches)
