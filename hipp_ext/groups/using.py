"""What is done with the groups of a model: looking at what reads units, masking them, sizes."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hipp_ext.groups.group import Group
from hipp_ext.groups.sliceable import check_loaded
from hipp_ext.kinds import KINDS, Look
from hipp_ext.projections import sync_features


def block_of(model: nn.Module, group: Group) -> Any:
    """The module that holds the layers of `group`, such as an attention or FFN module."""
    return model.get_submodule(group.block)


def sync_sizes(model: nn.Module, group: Group, width: int) -> None:
    """Bring the size attributes of the linear layers and block of `group` in line with `width`.

    Those of the linear layers follow their weights.
    """
    for name in group.layers:
        sync_features(model.get_submodule(name))
    KINDS[group.kind].resize(block_of(model, group), group.columns, width)


def watching(model: nn.Module, group: Group, look: Look) -> contextlib.AbstractContextManager[None]:
    """Inside the `with` block `look` sees, and may change, what a group's units are read by.

    See `hipp_ext.kinds.Look`.
    """
    block, consumer = block_of(model, group), model.get_submodule(group.consumer)
    return KINDS[group.kind].watch(block, consumer, look)


def reading_weight(model: nn.Module, group: Group) -> Float[Tensor, "outputs inputs"]:
    """Weight of the linear layer that reads a group's units, whose inputs lie side by side.

    Of a mixture of experts it is put together of their down projections: a copy.
    """
    consumer = model.get_submodule(group.consumer)
    return KINDS[group.kind].reading_weight(block_of(model, group), consumer)


@contextlib.contextmanager
def gated(model: nn.Module, keep_masks: Mapping[Group, Bool[Tensor, " width"]]) -> Iterator[None]:
    """Inside the block, units whose mask is False add nothing to what the model computes.

    The inputs of every consumer are multiplied by the mask; of a mixture of experts, tokens are
    sent to the experts that are left. Where no unit is kept, the block adds nothing, its biases
    included.
    """
    with contextlib.ExitStack() as stack:
        for group, mask in keep_masks.items():
            if bool(mask.all()):
                continue
            kind, block = KINDS[group.kind], block_of(model, group)
            consumer = model.get_submodule(group.consumer)
            check_loaded(model, group.consumer)
            if mask.any():
                stack.enter_context(kind.mask(block, consumer, group.inputs, mask))
            else:
                ends = kind.output(block, consumer)
                stack.enter_context(ends.register_forward_hook(_nothing))
        yield


def _nothing(_: nn.Module, __: tuple, output: Any) -> Any:
    """Zeros instead of what a module puts out, or of the first part of it."""
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)
