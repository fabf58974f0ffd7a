"""Checks that channels arrive where torch-pruning expects them, which a shuffle can prevent.

NaN is put on some channels where they are produced, and looked for where they should be read.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.scorers.channels import ChannelGroup

# A single misrouted channel is missed with a probability of (3/4)^6, and channels are hardly ever
# misrouted alone.
PROBES = 6


def misrouted(
    model: nn.Module, forward: Callable[[], Any], groups: Sequence[ChannelGroup]
) -> dict[str, UnsupportedModelError]:
    """Group name -> error, for every group whose channels are read in an unexpected order.

    Channels on which NaN never arrives (something in between removes it) give no verdict, and
    neither does a model that does not run with NaN. Buffers are restored.
    """
    generator = torch.Generator().manual_seed(0)
    marked = [torch.rand(PROBES, g.width, generator=generator) < 0.5 for g in groups]
    seen: dict[tuple[int, str], list[Tensor]] = {}
    held = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        for probe in range(PROBES):
            _probe(model, forward, groups, [m[probe] for m in marked], seen)
    except Exception:  # whatever a forward makes of NaN
        return {}
    finally:
        for buffer, value in held:
            buffer.detach().copy_(value)
    errors = {}
    for (place, layer), found in seen.items():
        group = groups[place]
        units = group.units_of(layer, produced=False)
        if units is None or len(found) < PROBES:
            continue
        arrived, expected = torch.stack(found)[:, units >= 0], marked[place][:, units[units >= 0]]
        if bool((arrived.any(0) & (expected & ~arrived).any(0)).any()):
            errors[group.name] = UnsupportedModelError(
                f"The channels of {group.name} are read by {layer} in another order than "
                "torch-pruning takes them to be: a "
                f"shuffle, split or reshape stands between. List {group.name} in ignored."
            )
    return errors


def _probe(
    model: nn.Module,
    forward: Callable[[], Any],
    groups: Sequence[ChannelGroup],
    marked: Sequence[Tensor],
    seen: dict[tuple[int, str], list[Tensor]],
) -> None:
    """Adds to `seen`, per group and consumer, on which input channels NaN arrived."""
    handles, here = [], {}
    made: dict[str, Tensor] = {}
    for place, group in enumerate(groups):
        for name, owner in zip(group.producers, group.producer_units, strict=True):
            marks = (owner >= 0) & marked[place][owner.clamp_min(0)]
            made[name] = made[name] | marks if name in made else marks
    for name, marks in made.items():
        handles.append(model.get_submodule(name).register_forward_hook(_mark(marks)))
    consumers: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        for consumer in group.consumers:
            consumers.setdefault(consumer.layer, []).append(place)
    for name, places in consumers.items():
        handles.append(
            model.get_submodule(name).register_forward_pre_hook(_look(name, places, here))
        )
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    for key, found in here.items():
        seen.setdefault(key, []).append(found)


def _channels_last(layer: nn.Module, x: Tensor) -> Tensor:
    """(everything else, channels) of a layer's input or output."""
    dim = -1 if isinstance(layer, nn.Linear) else -len(layer.kernel_size) - 1  # type: ignore[arg-type]
    return x.movedim(dim, -1)


def _mark(marks: Tensor) -> Callable:
    def hook(layer: nn.Module, _: tuple, out: Tensor) -> Tensor:
        out = out.clone()
        _channels_last(layer, out)[..., marks.to(out.device)] = float("nan")
        return out

    return hook


def _look(name: str, places: Sequence[int], here: dict[tuple[int, str], Tensor]) -> Callable:
    def hook(layer: nn.Module, args: tuple) -> tuple:
        arrived = _channels_last(layer, args[0]).isnan().flatten(0, -2).any(0).cpu()
        for place in places:  # a layer that is called twice has seen what both calls saw
            here[place, name] = here[place, name] | arrived if (place, name) in here else arrived
        return (args[0].nan_to_num(0.0), *args[1:])

    return hook
