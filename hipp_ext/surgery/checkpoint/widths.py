"""A model class whose instances have the widths of a folder from the moment they are built."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hipp_ext.errors import PlanError, UnsupportedModelError
from hipp_ext.groups import Group, Tower, block_of, channel_groups, find_groups, query_groups
from hipp_ext.kinds import KINDS
from hipp_ext.kinds.slices import Slice, tensor_in
from hipp_ext.model_folder import MANIFEST, ModelFolder, check_sizes, shapes_in
from hipp_ext.surgery.drop import replace_modules, skip_modules
from hipp_ext.surgery.layer_config import configured_skips
from hipp_ext.surgery.resize import resize, resized_shape


def resizing(stored: Any, folder: ModelFolder, kwargs: dict[str, Any], checked: bool = True) -> Any:
    """A subclass of `stored` whose instances have the folder's widths from the moment they are
    built; where they are `checked`, they agree with its weights.
    """

    def build(self: nn.Module, config: Any, *args: Any, **options: Any) -> None:
        stored.__init__(self, config, *args, **options)
        _spare_loaded_embeddings(self)
        shapes = shapes_in(self, folder, kwargs.get("key_mapping"))
        replace_modules(self, skip_modules(self, _dropped(self, config, folder, shapes)))
        named = _named_widths(folder, self)
        # KV groups first: query heads are found within them.
        for find in (_groups, _within):
            for g in find(self, folder):
                width = (
                    _width_in(shapes, self, g)
                    or named.get(g.name)
                    or _configured_width(config, self, g)
                )
                if width and width != g.width and not width % g.sections:
                    resize(self, g, width, _empty)
        exact = (
            not folder.quantised
            and not kwargs.get("ignore_mismatched_sizes")
            and not kwargs.get("quantization_config")
        )
        if checked:
            check_sizes(self, folder, shapes, exact)

    # The same name, so that transformers takes it for the class that config.json names.
    return type(stored.__name__, (stored,), {"__init__": build, "__module__": stored.__module__})


def groups_in(model: nn.Module, folder: ModelFolder) -> tuple[Group, ...]:
    """All groups of a model that was built of a folder, in all units that widths are kept of."""
    return _groups(model, folder) + _within(model, folder)


def initialise_as_usual(model: nn.Module) -> None:
    """Undo what `resizing` did to a model for the time that its weights are loaded."""
    for part in model.modules():
        part.__dict__.pop("_init_weights", None)


def _groups(model: nn.Module, folder: ModelFolder) -> tuple[Group, ...]:
    """Those that can be mapped. An ordinary folder may hold a model that has none."""
    towers: tuple[Tower, ...] = ("language", "vision", "projector")
    groups: tuple[Group, ...] = ()
    required = {g.tower for g in folder.manifest.groups} if folder.manifest else set()
    for tower in towers:
        try:
            groups += find_groups(model, (tower,), partial="report")
        except UnsupportedModelError:
            if tower in required:
                raise
    return groups


def _within(model: nn.Module, folder: ModelFolder) -> tuple[Group, ...]:
    """The query heads, and the channels of experts, of the blocks among `_groups`."""
    towers: tuple = tuple(dict.fromkeys(g.tower for g in _groups(model, folder)))
    return query_groups(model, towers) + channel_groups(model, towers)


def _dropped(
    model: nn.Module, config: Any, folder: ModelFolder, shapes: Mapping[str, tuple[int, ...]]
) -> list[Group]:
    """The groups whose blocks were dropped, by config.json and hipp_ext.json."""
    called = {kind.name: kind.names.skip for kind in KINDS.values()}  # the same for all units
    gone = {("language", layer, called[kind]) for layer, kind in configured_skips(config)}
    if folder.manifest is not None:
        listed = [g for g in folder.manifest.groups if not g.width]
        gone |= {(g.tower, g.layer, called[g.kind]) for g in listed}
    groups = _groups(model, folder) if gone else ()
    return [
        g
        for g in groups
        if (g.tower, g.layer, called[g.kind]) in gone
        and not any(p.parameter in shapes for p in g.owns)
    ]


def _named_widths(folder: ModelFolder, model: nn.Module) -> dict[str, int]:
    """Group name -> width in hipp_ext.json."""
    if folder.manifest is None:
        return {}
    widths = {g.name: g.width for g in folder.manifest.groups if g.width}
    towers: tuple = tuple(dict.fromkeys(g.tower for g in folder.manifest.groups))
    found = {g.name for g in find_groups(model, towers, partial="report")}
    within = {g.name for g in query_groups(model, towers) + channel_groups(model, towers)}
    if found != set(widths) - (within - found):
        raise PlanError(f"{MANIFEST} lists other groups than the model has.")
    return widths


def _width_in(shapes: dict[str, tuple[int, ...]], model: nn.Module, group: Group) -> int | None:
    """Units of `group` in the weights; None where they are packed, or do not fit."""
    stored = [s for s in reversed(group.cuts) if s[0].parameter in shapes]
    slices = next((s for s in stored if s[0] in group.produced or not group.is_linear), None)
    if slices is None:
        return None
    name, dim = slices[0].parameter, slices[0].dim
    built, shape = list(tensor_in(model, name).shape), list(shapes[name])
    size = sum(part.size for part in slices)
    # A weight in the built shape but for its units; packed ones have others.
    if built[:dim] + built[dim + 1 :] != shape[:dim] + shape[dim + 1 :]:
        return None
    units, rest = divmod(shape[dim] - built[dim], size)
    return None if rest or len(shape) != len(built) else group.width + units


def _configured_width(config: Any, model: nn.Module, group: Group) -> int | None:
    """Units of `group` by the configuration's `per_layer_config`."""
    text = config.get_text_config()
    if group.tower != "language" or not getattr(text, "is_heterogeneous", False):
        return None
    own = text.per_layer_config[group.layer]
    return KINDS[group.kind].configured_width(own, block_of(model, group), group.columns)


def _spare_loaded_embeddings(model: nn.Module) -> None:
    """Until `initialise_as_usual`, keep transformers from initialising embeddings that it loaded.

    Some classes set the row of the padding token to zero in any case (Youtu).
    """
    for part in model.modules():
        if initialise := getattr(part, "_init_weights", None):
            part._init_weights = functools.partial(_unless_loaded, initialise)  # type: ignore


def _unless_loaded(initialise: Callable[[nn.Module], None], module: nn.Module) -> None:
    # Embeddings of other classes have buffers to be initialised (Gemma 3).
    plain = type(module) is nn.Embedding
    if not (plain and getattr(module.weight, "_is_hf_initialized", False)):
        initialise(module)


def _empty(old: torch.Tensor, slices: Sequence[Slice], group: Group, width: int) -> torch.Tensor:
    shape = resized_shape(old.shape, slices, group, width)
    return torch.empty(shape, dtype=old.dtype, device=old.device)
