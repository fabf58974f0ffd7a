"""Layers made wider or narrower after the fact: to load what was pruned, and to pad it for loaders that know one width."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.groups import Group, Kind, Tower, block_of, find_groups, linear, sync_sizes
from hipp_ext.surgery.prune import OWN_KEYS, PLAN_ATTRIBUTE, forget_bound_methods, per_layer_values

Make = Callable[[nn.Parameter, tuple[int, ...]], torch.Tensor]
Part = tuple[Tower, Kind]  # groups that share one entry of the configuration


def pad_to_uniform(model: nn.Module) -> nn.Module:
    """A copy of `model` with zero units added until all layers are equally wide, for loaders that know one width only.

    Same logits (the added units contribute nothing); stock `from_pretrained` loads what its `save_pretrained` writes.
    The memory that heterogeneous widths save over uniform ones is given back. Where other modules are built from the same
    entry of the configuration (SigLIP's pooling head, Idefics2's connector), those layers are padded to their dense width.

    Raises:
        UnsupportedModelError: even with dense widths stock transformers would build other shapes than the model has.
    """
    parts = _parts(model)
    dense = {part: _dense_width(model, part) for part in parts}
    widths = {part: _narrow_width(model, part, groups) for part, groups in parts.items()}
    if _misfits(model, parts, widths):
        narrow, widths = widths, dense
        for part in parts:
            trial = widths | {part: narrow[part]}
            widths = widths if _misfits(model, parts, trial) else trial
        if wrong := _misfits(model, parts, widths):
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be padded: stock transformers would build other shapes for {wrong[:4]}."
            )
    model = copy.deepcopy(model)
    model.__dict__.pop(PLAN_ATTRIBUTE, None)
    forget_bound_methods(model)
    _write_widths(model.config, parts, widths)
    for part, groups in parts.items():
        for g in groups:
            resize(model, g, widths[part], _padded)
    return model


def known_towers(model: nn.Module) -> tuple[Tower, ...]:
    """The towers whose widths can be told, whatever was pruned."""
    try:
        find_groups(model, ("vision",))
    except UnsupportedModelError:
        return ("language",)
    return ("language", "vision")


def resize(model: nn.Module, group: Group, width: int, make: Make) -> None:
    """Give the layers of `group` `width` units; `make` turns an old parameter into one of a given shape."""
    for name, size in zip(group.producers, group.rows, strict=True):
        producer = linear(model, name)
        _replace(producer, "weight", (width * size, producer.weight.shape[1]), make)
        if producer.bias is not None:
            _replace(producer, "bias", (width * size,), make)
    consumer = linear(model, group.consumer)
    _replace(consumer, "weight", (consumer.weight.shape[0], width * group.columns), make)
    sync_sizes(model, group, width)


def _replace(layer: nn.Linear, part: str, shape: tuple[int, ...], make: Make) -> None:
    old = getattr(layer, part)
    if old.shape != shape:
        setattr(layer, part, nn.Parameter(make(old, shape), requires_grad=old.requires_grad))


def _padded(old: nn.Parameter, shape: tuple[int, ...]) -> torch.Tensor:
    new = old.new_zeros(shape)
    new[tuple(slice(s) for s in old.shape)] = old.data
    return new


def _parts(model: nn.Module) -> dict[Part, list[Group]]:
    parts: dict[Part, list[Group]] = {}
    for g in find_groups(model, known_towers(model)):
        parts.setdefault((g.tower, g.kind), []).append(g)
    return parts


def _part_config(config: Any, part: Part) -> Any:
    return config.get_text_config() if part[0] == "language" else config.vision_config


def _dense_width(model: Any, part: Part) -> int:
    """The width that the configuration names for all layers, which pruning leaves there."""
    config = _part_config(model.config, part)
    names = (
        ["intermediate_size"]
        if part[1] == "ffn"
        else ["num_key_value_heads", "num_attention_heads"][part[0] == "vision" :]
    )
    width = next(
        (value for name in names if isinstance(value := getattr(config, name, None), int)), None
    )
    if width is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be padded: its {type(config).__name__} has no {' or '.join(names)}."
        )
    return width


def _narrow_width(model: Any, part: Part, groups: Iterable[Group]) -> int:
    """The least width that holds all groups and that the configuration can express."""
    width, dense = max(g.width for g in groups), _dense_width(model, part)
    if part == ("vision", "attention"):
        return dense  # the head dimension is derived from the number of heads
    return (
        width
        if part[1] == "ffn"
        else _loadable_kv_groups(
            _part_config(model.config, part), width, dense, _repeat(model, groups)
        )
    )


def _repeat(model: nn.Module, groups: Iterable[Group]) -> int:
    """Query heads of a KV group."""
    first = next(iter(groups))
    return first.columns // block_of(model, first).head_dim


def _loadable_kv_groups(config: Any, needed: int, dense: int, repeat: int) -> int:
    """The least number of KV groups that is at least `needed` and that the config's own checks accept."""
    if (
        getattr(config, "head_dim", None) is None
    ):  # derived from the number of heads, which then cannot change
        return dense
    divides = (w for w in range(needed, dense) if config.hidden_size % (w * repeat) == 0)
    return next(divides, dense)


def _write_widths(config: Any, parts: Iterable[Part], widths: Mapping[Part, int]) -> None:
    """Bring `config` in line; per layer it keeps what the model has of its own."""
    text = config.get_text_config()
    own = per_layer_values(text)
    own = {
        i: rest
        for i, values in own.items()
        if (rest := {k: v for k, v in values.items() if k not in OWN_KEYS})
    }
    text.per_layer_config = own or None
    text.allow_global_per_layer_attribute_access = bool(own)
    for part in parts:
        inner = _part_config(config, part)
        if part[1] == "ffn":
            inner.intermediate_size = widths[part]
        elif part[0] == "language":
            repeat = inner.num_attention_heads // (
                getattr(inner, "num_key_value_heads", None) or inner.num_attention_heads
            )
            inner.num_key_value_heads, inner.num_attention_heads = (
                widths[part],
                widths[part] * repeat,
            )


def _misfits(
    model: Any, parts: Mapping[Part, Iterable[Group]], widths: Mapping[Part, int]
) -> list[str]:
    """Names whose shapes in the padded model differ from what stock transformers builds of its configuration."""
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for part, groups in parts.items():
        for g in groups:
            for name, size, dim in _units(model, g):
                shape = list(wanted[name])
                shape[dim] = widths[part] * size
                wanted[name] = tuple(shape)
    config = copy.deepcopy(model.config)
    try:
        _write_widths(config, parts, widths)
        with torch.device("meta"):
            built = {
                name: tuple(t.shape)
                for name, t in type(model)._from_config(config).state_dict().items()
            }
    except (ValueError, RuntimeError, ArithmeticError) as error:  # the class refuses such sizes
        return [f"{type(error).__name__}: {error}"]
    return sorted(
        name for name in wanted.keys() | built.keys() if wanted.get(name) != built.get(name)
    )


def _units(model: nn.Module, group: Group) -> Iterable[tuple[str, int, int]]:
    """(name, size, dim) of the parameters that units of `group` own parts of."""
    for name, rows in zip(group.producers, group.rows, strict=True):
        yield f"{name}.weight", rows, 0
        if linear(model, name).bias is not None:
            yield f"{name}.bias", rows, 0
    yield f"{group.consumer}.weight", group.columns, 1
