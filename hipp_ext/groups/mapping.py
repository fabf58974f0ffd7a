"""Blocks -> groups: how many units a block has, what each owns, and what a layer has besides."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from hipp_ext.families import first_removable_layer, norms_residual, varies_by_itself
from hipp_ext.groups.group import Group, LeftWhole
from hipp_ext.kinds import KINDS, BlockKind, Skip
from hipp_ext.kinds.slices import shape_in
from hipp_ext.layer_parts import missing_block, parts_of
from hipp_ext.towers import (
    Tower,
    picture_tokens,
    projected_tokens,
    projector_blocks,
    tower_config,
    tower_layers,
)


def map_towers(
    model: nn.Module, towers: Sequence[Tower], unit_of: Callable[[BlockKind, nn.Module], BlockKind]
) -> tuple[tuple[Group, ...], tuple[LeftWhole, ...]]:
    """All groups, and what is left whole; `unit_of` says by which kind a block is divided."""
    names = {module: name for name, module in model.named_modules()}
    groups: list[Group] = []
    left: list[LeftWhole] = []
    for tower in towers:
        if tower == "projector":
            groups += _projector_groups(model, names)
            continue
        layers = tower_layers(model, tower)
        seen = 0 if tower == "language" else picture_tokens(model.config)
        config, first = tower_config(model.config, tower), first_removable_layer(model.config)
        parts = [parts_of(layer, names[layer]) for layer in layers]
        # Configurations name the layers of a hybrid by number or by period.
        alike = not any(p.left for p in parts)
        named = tower == "language" and alike and not varies_by_itself(config)
        for index, own in enumerate(parts):
            removable = named and index >= first and not own.others
            removable = removable and not norms_residual(layers[index])
            for kind, block, name in own.blocks:
                if not isinstance(block, Skip):
                    group = _map_block(tower, index, unit_of(kind, block), block, name)
                    counts = _stock_counts(config, group, block)
                    changes: Any = {"stock_counts": counts, "removable": removable}
                    groups.append(replace(group, picture_tokens=seen, **changes))
            if alike and (lacking := missing_block(own)):
                left.append(_left(layers[index], names[layers[index]], f"it has {lacking}"))
            left += [_left(*part) for part in own.left]
    return tuple(groups), tuple(left)


def _left(module: nn.Module, name: str, reason: str) -> LeftWhole:
    return LeftWhole(module=name, type=type(module).__name__, reason=reason)


def _projector_groups(model: Any, names: dict[nn.Module, str]) -> list[Group]:
    """The groups of the projector: its configuration names no width, and it cannot be dropped."""
    kind, found = KINDS["ffn"], []
    for index, block in enumerate(projector_blocks(model)):
        group = _map_block("projector", index, kind, block, names[block])
        own: Any = {"stock_counts": (group.width,), "removable": False, "droppable": False}
        found.append(replace(group, picture_tokens=projected_tokens(model.config), **own))
    return found


def _map_block(tower: Tower, index: int, kind: BlockKind, block: nn.Module, name: str) -> Group:
    width = kind.width(block, name)
    owns = kind.owns(block, name, width)
    kind.check_rest(block, name, width)
    buffer_names = {f"{name}.{own}" for own, _ in block.named_buffers()}
    buffers = tuple(part for part in owns if part.parameter in buffer_names)
    owns = tuple(part for part in owns if part not in buffers)
    parameters, active, multiplied = 0, 0.0, 0.0
    for part in owns:
        shape = shape_in(block, part.parameter.removeprefix(f"{name}."))
        size = math.prod(shape) // shape[part.dim] * part.size
        parameters += size
        active += size * kind.active_share(block, part)
        if part.linear and len(shape) > 1:
            multiplied += size * kind.active_share(block, part)
    return Group(
        tower=tower,
        layer=index,
        kind=kind.name,
        width=width,
        owns=owns,
        buffers=buffers,
        unit_parameters=parameters,
        unit_active=round(active),
        unit_flops=round(2 * multiplied),
        inputs=kind.inputs(block, owns),
        least=kind.least(block),
        sections=kind.sections(block),
        droppable=kind.droppable(block),
    )


def _stock_counts(config: Any, group: Group, block: nn.Module) -> tuple[int, ...] | None:
    """See `Group.stock_counts`; only its width where the configuration names no width at all."""
    kind = KINDS[group.kind]
    if varies_by_itself(config):
        return (group.width,)
    common = kind.common_width(config, group.tower)
    if common is None:
        return (group.width,)
    counts = kind.stock_counts(config, group.tower, common, block, group.columns)
    return counts and tuple(n for n in counts if n < group.width) + (group.width,)
