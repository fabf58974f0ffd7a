"""A classifier's multiply-accumulates and parameters as exact functions of its channels."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hipp_ext.budget import Cost
from hipp_ext.budget.cost import Factor, Term
from hipp_ext.errors import UnsupportedModelError
from hipp_ext.modes import call, evaluating
from hipp_ext.scorers.channels import ChannelGroup, require_removable


def channel_costs(
    model: nn.Module, example_inputs: Any, groups: Sequence[ChannelGroup]
) -> tuple[Cost, Cost]:
    """(MACs, parameters) of `model` as functions of the channels kept in `groups`.

    MACs are those of convolutions and linear layers for the rows of `example_inputs`. Parameters
    are all of the model's: what torch-pruning removes with a channel belongs to the channel.

    Args:
        model: any model that torch-pruning traces.
        example_inputs: one row, so that MACs are those of one image.
        groups: from `find_channel_groups`.

    Raises:
        UnsupportedModelError: a layer has several groups and is not depthwise, units of one group
            have different sizes, or channels of a group cannot be removed. The message names the
            layer.
    """
    require_removable(groups)
    positions = _positions(model, example_inputs)
    macs: list[Term] = []
    for name, layer in _channel_layers(model).items():
        grouped = isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1
        if grouped and layer.groups != layer.in_channels:
            raise UnsupportedModelError(
                f"{name} has {layer.groups} groups; only plain and depthwise convolutions are "
                "counted."
            )
        factors = [_factor(name, layer, groups, produced=True)]
        if not grouped:  # a depthwise convolution has one input channel per output channel
            factors.append(_factor(name, layer, groups, produced=False))
        macs.append((positions.get(name, 0) * layer.weight[0, 0].numel(), tuple(factors)))
    parameters = _parameter_terms(model, groups)
    return Cost(name="MACs", terms=tuple(macs)), Cost(name="parameters", terms=parameters)


def _parameter_terms(model: nn.Module, groups: Sequence[ChannelGroup]) -> tuple[Term, ...]:
    """One product of sizes for every parameter that channels own a part of, and one constant."""
    cut: dict[str, dict[int, list[tuple[int, int]]]] = {}
    for i, group in enumerate(groups):
        if not group.slices:
            raise UnsupportedModelError(
                f"{group.name} does not say which parameters its channels own; groups from "
                "find_channel_groups are needed."
            )
        for part in group.slices:
            size = _even(part.sizes, part.parameter, group)
            cut.setdefault(part.parameter, {}).setdefault(part.dim, []).append((i, size))
    terms: list[Term] = []
    rest = 0
    for name, parameter in model.named_parameters():
        coefficient, factors = 1, []
        for dim, size in enumerate(parameter.shape):
            if sizes := cut.get(name, {}).get(dim):
                constant = size - sum(n * groups[i].width for i, n in sizes)
                factors.append((constant, tuple(sizes)))
            else:
                coefficient *= size
        if factors:
            terms.append((coefficient, tuple(factors)))
        else:
            rest += coefficient
    return (*terms, (rest, ()))


def _even(counts: torch.Tensor, name: str, group: ChannelGroup) -> int:
    if len(set(counts.tolist())) != 1:
        raise UnsupportedModelError(
            f"The units of {group.name} own different numbers of entries of {name}: "
            f"{counts.tolist()[:8]}, ..."
        )
    return int(counts[0])


def _factor(name: str, layer: Any, groups: Sequence[ChannelGroup], produced: bool) -> Factor:
    """Output channels (`produced`) or input channels of a layer as a function of keep counts."""
    if isinstance(layer, nn.Linear):
        size = layer.out_features if produced else layer.in_features
    else:
        size = layer.out_channels if produced else layer.in_channels
    sizes, owned = [], 0
    for i, group in enumerate(groups):
        units = group.units_of(name, produced)
        if units is None:
            continue
        counts = torch.bincount(units[units >= 0], minlength=group.width)
        sizes.append((i, _even(counts, name, group)))
        owned += int(counts.sum())
    return size - owned, tuple(sizes)


def _channel_layers(model: nn.Module) -> dict[str, Any]:
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    return {n: m for n, m in model.named_modules() if isinstance(m, layers)}


def _positions(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """Layer -> how often one forward pass multiplies each of its weights.

    That is once per output position, or per input position of a transposed convolution.
    """
    positions: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(layer: Any, inputs: tuple, output: Any) -> None:
            x = inputs[0] if getattr(layer, "transposed", False) else output
            linear = isinstance(layer, nn.Linear)
            channels = x.shape[-1] if linear else x.shape[-len(layer.kernel_size) - 1]
            positions[name] = positions.get(name, 0) + x.numel() // channels

        return hook

    with contextlib.ExitStack() as stack, evaluating(model), torch.no_grad():
        for name, layer in _channel_layers(model).items():
            stack.callback(layer.register_forward_hook(count(name)).remove)
        call(model, example_inputs)
    return positions
