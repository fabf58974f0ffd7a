"""Layers that differ in width, padded for loaders of one width."""

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.families import varies_by_itself
from hipp_ext.groups import (
    Group,
    Kind,
    Tower,
    block_of,
    channel_groups,
    find_groups,
    find_skips,
    known_towers,
    query_groups,
    tower_config,
    tower_layers,
)
from hipp_ext.kinds import KINDS, Skip
from hipp_ext.surgery.drop import replace_modules
from hipp_ext.surgery.layer_config import built_shapes, built_widths, other_layer_values, set_layers
from hipp_ext.surgery.masks import PLAN_ATTRIBUTE
from hipp_ext.surgery.prune import forget_bound_methods
from hipp_ext.surgery.resize import padded, resize, resized_shape

Part = tuple[Tower, Kind]  # groups that share one entry of the configuration


def pad_to_uniform(model: nn.Module) -> nn.Module:
    """A copy of `model` with zero units added until all layers are equally wide.

    For loaders that know one width only: stock `from_pretrained` loads what its `save_pretrained`
    writes. Same logits, because the added units contribute nothing. The memory that heterogeneous
    widths save over uniform ones is given back, and so is that of single dropped blocks (a layer
    dropped whole stays out). Where other modules are built from the same entry of the configuration
    (SigLIP's pooling head, Idefics2's connector), those layers are padded to their dense width.

    Raises:
        UnsupportedModelError: even with dense widths stock transformers would build other shapes
            than the model has; or layers differ in their number of experts, none of which can be
            added without effect.
    """
    if varies_by_itself(model.config.get_text_config()):  # type: ignore[union-attr]
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be padded: its layers differ before they are pruned."
        )
    model = _with_all_blocks(model)
    _check_experts(model)
    _pad_unnamed(model)
    wrong: list[str] = []
    for repeat, channels in itertools.product(_repeats(model), _channel_widths(model)):
        _pad_query_heads(model, repeat)
        _pad_channels(model, channels)
        parts = _parts(model)
        widths = _common_widths(model, parts)
        if not (wrong := _misfits(model, parts, widths)):
            _write_widths(model.config, parts, widths)
            for part, groups in parts.items():
                for g in groups:
                    resize(model, g, widths[part], padded)
            return model
    raise UnsupportedModelError(
        f"{type(model).__name__} cannot be padded: stock transformers would build other "
        f"shapes for {wrong[:4]}."
    )


def _check_experts(model: nn.Module) -> None:
    """Raise UnsupportedModelError where layers differ in units that cannot be padded."""
    counts: dict[Kind, set[int]] = {}
    for g in find_groups(model, partial="report"):
        if not KINDS[g.kind].neutral_zeros:
            counts.setdefault(g.kind, set()).add(g.width)
    for kind, found in counts.items():
        if len(found) > 1:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be padded: its layers have {sorted(found)} "
                f"{KINDS[kind].unit}, and a router would send tokens to added ones. Plan with "
                "shape='uniform', or with expert_unit='channel'."
            )


def _repeats(model: Any) -> list[int]:
    """Query heads per KV group that all layers can have: the most of any layer, and the dense
    number. One where no block has query heads of its own (MLA).
    """
    text = model.config.get_text_config()
    kv_heads = KINDS["attention"].common_width(text, "language")
    found = [g.width // g.sections for g in query_groups(model, ("language",))]
    if not found:
        return [1]
    dense = text.num_attention_heads // kv_heads if kv_heads else max(found)
    return sorted({max(found), dense})


def _pad_query_heads(model: Any, repeat: int) -> None:
    """Add zero query heads until every KV group of the language tower has `repeat` of them."""
    groups = query_groups(model, ("language",))
    for g in groups:
        resize(model, g, g.sections * repeat, padded)
    text = model.config.get_text_config()
    kv_heads = KINDS["attention"].common_width(text, "language")
    if groups and kv_heads and text.num_attention_heads != kv_heads * repeat:
        _write_widths(model.config, (), {})
        KINDS["query_heads"].set_common_width(text, "language", kv_heads * repeat)


def _channel_widths(model: Any) -> list[int]:
    """Channels that all experts can have: the most of any layer, aligned, and the dense number.

    Only the dense one where other blocks are built from the same entry of the configuration.
    """
    groups = channel_groups(model, ("language",))
    if not groups:
        return [0]
    config, kind = model.config.get_text_config(), KINDS["expert_channels"]
    most, step = max(g.width for g in groups), groups[0].multiple(1)
    dense = kind.common_width(config, "language") or most
    found = find_groups(model, partial="report")
    others = {KINDS[g.kind].named(config) for g in found if g.is_linear}
    if kind.named(config) in others:
        return [dense]
    return sorted({min(-(-most // step) * step, dense), dense})


def _pad_channels(model: Any, width: int) -> None:
    """Add channels of zeros until all experts have `width` of them."""
    groups = channel_groups(model, ("language",))
    for g in groups:
        resize(model, g, width, padded)
    text, kind = model.config.get_text_config(), KINDS["expert_channels"]
    if groups and kind.common_width(text, "language") != width:
        _write_widths(model.config, (), {})
        kind.set_common_width(text, "language", width)


def _common_widths(model: nn.Module, parts: Mapping[Part, Sequence[Group]]) -> dict[Part, int]:
    """The least widths of all layers that stock transformers builds, else dense ones."""
    widths = {part: _narrow_width(model, part, groups) for part, groups in parts.items()}
    if _misfits(model, parts, widths):
        fixed = {p for p in parts if not KINDS[p[1]].neutral_zeros}
        dense = {p: widths[p] if p in fixed else _dense_width(model, p) for p in parts}
        narrow, widths = widths, dense
        for part in parts:
            trial = widths | {part: narrow[part]}
            widths = widths if _misfits(model, parts, trial) else trial
    return widths


def _with_all_blocks(model: Any) -> Any:
    """A copy of `model` in which blocks of zeros, which add nothing, stand where some were
    dropped.
    """
    model = copy.deepcopy(model)
    model.__dict__.pop(PLAN_ATTRIBUTE, None)
    forget_bound_methods(model)
    towers: list[Tower] = [tower for tower in known_towers(model) if find_skips(model, tower)]
    if not towers:
        return model
    config = copy.deepcopy(model.config)
    _write_widths(config, [], {})
    like = next(model.parameters())
    with torch.device("meta"):
        whole = type(model)._from_config(config, dtype=like.dtype)
    for tower in towers:
        pairs = zip(tower_layers(model, tower), tower_layers(whole, tower), strict=True)
        for layer, stock in pairs:
            device = next(layer.parameters(), like).device
            for name, child in list(layer.named_modules()):
                if isinstance(child, Skip | nn.Identity):
                    block = stock.get_submodule(name).to_empty(device=device)
                    for parameter in block.parameters():
                        parameter.data.zero_()
                    replace_modules(layer, {name: block.train(layer.training)})
    return model


def _parts(model: Any) -> dict[Part, list[Group]]:
    """The groups by entries of the configuration, but for those that are as wide as stock
    transformers builds them: the entry need not say so (GLM-4V's vision tower).
    """
    parts: dict[Part, list[Group]] = {}
    for g in find_groups(model, known_towers(model), partial="report"):
        parts.setdefault((g.tower, g.kind), []).append(g)
    config = copy.deepcopy(model.config)
    _write_widths(config, (), {})
    built = built_shapes(model, config)
    own = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    names = {part: [s.parameter for g in groups for s in g.owns] for part, groups in parts.items()}
    changed = [part for part in parts if any(own[n] != built.get(n) for n in names[part])]
    return {part: parts[part] for part in changed}


def _pad_unnamed(model: Any) -> None:
    """Bring the parts whose width no field of the configuration names to what stock transformers
    builds: projectors, and FFN of vision tower whose width follows from other sizes (Qwen2-VL,
    GLM-4V).
    """
    towers: list[Tower] = [tower for tower in known_towers(model) if tower != "language"]
    stock = built_widths(model, towers) if towers else {}
    for g in find_groups(model, towers, partial="report") if towers else ():
        width, config = stock.get(g.name), tower_config(model.config, g.tower)
        if g.tower == "projector" or KINDS[g.kind].common_width(config, g.tower) != width:
            resize(model, g, width or g.width, padded)


def _dense_width(model: Any, part: Part) -> int:
    """The width that the configuration names for all layers, which pruning leaves there; else the
    one that stock transformers builds (MPT and Bloom have a factor, or nothing).
    """
    config, kind = tower_config(model.config, part[0]), KINDS[part[1]]
    width = kind.common_width(config, part[0])
    if width is not None:
        return width
    built = built_shapes(model, model.config)
    groups = find_groups(model, (part[0],), partial="report")
    widths = {
        built[g.owns[-1].parameter][g.owns[-1].dim] // g.columns
        for g in groups
        if g.kind == part[1] and g.owns[-1].parameter in built
    }
    if len(widths) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be padded: its {type(config).__name__} has no "
            f"{' or '.join(kind.fields)}."
        )
    return widths.pop()


def _narrow_width(model: Any, part: Part, groups: Sequence[Group]) -> int:
    """The least width that holds all groups and that the configuration can express."""
    first, needed = groups[0], max(g.width for g in groups)
    config, block = tower_config(model.config, part[0]), block_of(model, first)
    dense = _dense_width(model, part)
    counts = KINDS[part[1]].stock_counts(config, part[0], dense, block, first.columns)
    # Where no count is large enough, as in layers of two kinds, `_misfits` finds it out.
    return needed if counts is None else next((n for n in counts if n >= needed), needed)


def _write_widths(config: Any, parts: Iterable[Part], widths: Mapping[Part, int]) -> None:
    """Bring `config` in line; per layer it keeps what the model has of its own."""
    text = config.get_text_config()
    set_layers(text, other_layer_values(text))
    for part in parts:
        of_tower, kind = tower_config(config, part[0]), KINDS[part[1]]
        if kind.common_width(of_tower, part[0]) is not None:
            kind.set_common_width(of_tower, part[0], widths[part])


def _misfits(
    model: Any, parts: Mapping[Part, Iterable[Group]], widths: Mapping[Part, int]
) -> list[str]:
    """Names whose shapes in the padded model differ from those that stock transformers builds."""
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for part, groups in parts.items():
        for group, slices in ((g, slices) for g in groups for slices in g.cuts):
            name = slices[0].parameter
            wanted[name] = resized_shape(wanted[name], slices, group, widths[part])
    config = copy.deepcopy(model.config)
    try:
        _write_widths(config, parts, widths)
    except (ValueError, RuntimeError, ArithmeticError) as error:  # the class refuses such sizes
        return [f"{type(error).__name__}: {error}"]
    built = built_shapes(model, config)
    return sorted(n for n in wanted.keys() | built.keys() if wanted.get(n) != built.get(n))
