"""A model's widths and dropped blocks in its configuration, and back."""

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.families import FIELD_NAMES, varies_by_itself
from hipp_ext.groups import Kind, Tower, block_of, find_groups, find_skips
from hipp_ext.kinds import KINDS

# What pruning writes into per_layer_config.
OWN_KEYS = {
    "skip",
    *(n for kind in KINDS.values() for f in kind.fields for n in (f, *FIELD_NAMES.get(f, ()))),
}


def write_layer_config(model: nn.Module) -> None:
    """Put the language tower's widths and dropped blocks into its config; other entries there stay.

    Where layers differ, they are written as transformers' `per_layer_config`, which transformers
    reads and writes (5.15 and newer) but does not build most models from yet; `load_pruned` does.
    The flag beside it keeps the configuration loadable by `AutoConfig`. Where all layers are alike,
    the configuration says so in its ordinary fields, and stock `from_pretrained` loads the model.
    Where layers differ before anything is pruned, it is left alone, and hipp_ext.json has the
    widths.
    """
    _write_vision(model)
    config: Any = model.config.get_text_config()  # type: ignore[union-attr]
    if varies_by_itself(config):
        allot_caches_late(model)
        return
    layers = _layers(model)
    rest = other_layer_values(config)
    if not rest and _write_alike(model, config, layers):
        return
    quiet_width_warnings()
    own = _own_values(config)
    merged = {i: own.get(i, {}) | layers.get(i, {}) for i in sorted({*own, *layers})}
    set_layers(config, merged)
    allot_caches_late(model)


def _write_vision(model: Any) -> None:
    """Write the FFN width of a vision tower whose layers are all alike, if it is built so.

    There is no standard for layers that differ: those are in the manifest alone.
    """
    try:
        groups = find_groups(model, ("vision",))
    except UnsupportedModelError:
        return
    kind = KINDS["ffn"]
    widths = {g.width for g in groups if g.kind == kind.name}
    common = kind.common_width(model.config.vision_config, "vision")
    if len(widths) != 1 or common is None or widths == {common}:
        return
    (width,) = widths
    own = {p.parameter for g in groups for p in g.owns}
    there = {n: tuple(t.shape) for n, t in model.state_dict().items() if n in own}

    def builds(config: Any) -> bool:
        shapes = built_shapes(model, config)
        return {n: shapes.get(n) for n in own} == there

    trial = copy.deepcopy(model.config)
    kind.set_common_width(trial.vision_config, "vision", width)
    # The entry may be that of another part: GLM-4V's blocks are as wide as what they put out.
    if not builds(model.config) and builds(trial):
        kind.set_common_width(model.config.vision_config, "vision", width)


def _layers(model: nn.Module) -> dict[int, dict[str, Any]]:
    """Layer -> what its configuration has to say of its blocks."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr]
    layers: dict[int, dict[str, Any]] = {}
    for g in find_groups(model, partial="report"):
        kind = KINDS[g.kind]
        sizes = kind.config(block_of(model, g), g.columns, g.width, config)
        # A field that the configuration does not have would count as one of all layers.
        known = {n: size for k, size in sizes.items() if (n := kind.field(config, k))}
        layers.setdefault(g.layer, {}).update(known)
    for layer, kind in find_skips(model):
        layers.setdefault(layer, {}).setdefault("skip", []).append(KINDS[kind].names.skip)
    return layers


def _write_alike(model: Any, config: Any, layers: Mapping[int, dict[str, Any]]) -> bool:
    """Write one set of sizes for all layers, if all have it and transformers builds the model
    so.
    """
    first: dict[str, Any] = {}
    for sizes in layers.values():  # layers of different kinds say different things
        if "skip" in sizes or any(first.setdefault(k, v) != v for k, v in sizes.items()):
            return False
    before = {key: getattr(config, key) for key in first if hasattr(config, key)}
    if before == first and not getattr(config, "is_heterogeneous", False):
        return True
    trial = copy.deepcopy(model.config)
    _set_alike(trial.get_text_config(), first)
    if built_shapes(model, trial) != {n: tuple(t.shape) for n, t in model.state_dict().items()}:
        return False
    _set_alike(config, first)
    return True


def _set_alike(config: Any, sizes: Mapping[str, Any]) -> None:
    set_layers(config, {})
    for key, value in sizes.items():
        setattr(config, key, value)


def set_layers(config: Any, layers: dict[int, dict[str, Any]]) -> None:
    """Have `config` say `layers`, and nothing else, of single layers."""
    config.per_layer_config = layers or None
    config.allow_global_per_layer_attribute_access = bool(layers)


def built_shapes(model: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that stock transformers builds of `config`, once it was written and
    read; empty if it builds none.
    """
    try:
        # As it comes out of a file: some classes derive fields from others when they are made.
        config = type(config).from_dict(config.to_dict())
        with torch.device("meta"):
            built = type(model)._from_config(config)
    except Exception:  # the class refuses such sizes, or is a wrapper that builds nothing (peft)
        return {}
    return {name: tuple(t.shape) for name, t in built.state_dict().items()}


def built_widths(model: Any, towers: Sequence[Tower]) -> dict[str, int]:
    """Group name -> units that stock transformers builds of the model's configuration, apart from
    what pruning wrote there; empty if it builds no such groups."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    set_layers(text, other_layer_values(text))
    try:
        with torch.device("meta"):
            built = type(model)._from_config(config)
        return {g.name: g.width for g in find_groups(built, towers)}
    except Exception:  # as above
        return {}


def other_layer_values(config: Any) -> dict[int, dict[str, Any]]:
    """Layer -> what `config` says of it alone, apart from what pruning writes."""
    rest = {
        i: {k: v for k, v in values.items() if k not in OWN_KEYS}
        for i, values in _own_values(config).items()
    }
    return {i: values for i, values in rest.items() if values}


def _own_values(config: Any) -> dict[int, dict[str, Any]]:
    """Layer -> what `config` says of it alone, apart from dropped blocks."""
    own = config.to_dict().get("per_layer_config") or {}
    return {int(i): {k: v for k, v in of.items() if k != "skip"} for i, of in own.items()}


def configured_skips(config: Any) -> list[tuple[int, Kind]]:
    """(layer, kind) of the language tower's blocks that `config` says were dropped."""
    text = config.get_text_config()
    if not getattr(text, "is_heterogeneous", False):
        return []
    return [
        (layer, kind.name)
        for layer, own in enumerate(text.per_layer_config)
        for kind in KINDS.values()
        if kind.names.skip in own.skip
    ]


def allot_caches_late(model: Any) -> None:
    """Have `generate` allot a static cache layer by layer, at the first token.

    It does so where layers are on several GPUs. For prefill in chunks transformers (5.17) allots it
    ahead, with one number of heads for all layers.
    """
    model._get_static_cache_init_shape = _no_common_shape


def _no_common_shape() -> None:
    """A function of the module: what a copy of the model holds must not lead to the original."""


def quiet_width_warnings() -> None:
    """Keep transformers from warning of every width that it reads from a heterogeneous config."""
    name = "transformers.integrations.heterogeneity.configuration_utils"
    logging.getLogger(name).addFilter(_is_not_about_global_widths)


def _is_not_about_global_widths(record: logging.LogRecord) -> bool:
    return "Reading global config value for per-layer attribute" not in record.getMessage()
