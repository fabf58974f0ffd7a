"""Layers made wider or narrower: to load what was pruned, and to pad it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hipp_ext.groups import Group, sync_sizes
from hipp_ext.kinds.slices import Slice, change_units, padded_units, tensors_of

# Old parameter, all slices of a group in it, the group, its new width -> new values.
Make = Callable[[torch.Tensor, Sequence[Slice], Group, int], torch.Tensor]


def resize(model: nn.Module, group: Group, width: int, make: Make) -> None:
    """Give the layers of `group` `width` units; `make` turns an old parameter into a new one."""
    for slices in group.cuts if width != group.width else ():
        owner, _, name = slices[0].parameter.rpartition(".")
        store = tensors_of(model.get_submodule(owner), name)
        old: Any = store[name]
        new = make(old, slices, group, width)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        store[name] = new
    sync_sizes(model, group, width)


def resized_shape(
    shape: Sequence[int], slices: Sequence[Slice], group: Group, width: int
) -> tuple[int, ...]:
    """The shape of a parameter when `group` has `width` units."""
    new = list(shape)
    new[slices[0].dim] += (width - group.width) * sum(part.size for part in slices)
    return tuple(new)


def padded(old: torch.Tensor, slices: Sequence[Slice], group: Group, width: int) -> torch.Tensor:
    """The old values, and zeros behind those of each section."""
    return change_units(old.data, slices, group.width, padded_units(width, group.sections))
