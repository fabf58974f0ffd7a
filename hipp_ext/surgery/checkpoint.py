"""Save and load pruned models whose layers differ in width; pad them for loaders that cannot.

A saved folder is a transformers folder (config.json with `per_layer_config`, safetensors,
processor) plus `hipp_ext.json`, which holds the widths of every group, and `hipp_plan.json`, the
plan. Models that llm-compressor quantised are saved and loaded likewise, with compressed weights.
"""

import contextlib
import copy
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hipp_ext.errors import CheckpointError, MissingExtraError, PlanError, UnsupportedModelError
from hipp_ext.families import varies_by_itself
from hipp_ext.files import new_folder, require_new, write_atomic
from hipp_ext.groups import (
    Group,
    Tower,
    block_of,
    channel_groups,
    find_groups,
    find_skips,
    query_groups,
    tower_layers,
)
from hipp_ext.kinds import KINDS
from hipp_ext.kinds.slices import Slice, tensor_in
from hipp_ext.model_folder import (
    MANIFEST,
    GroupWidth,
    Manifest,
    ModelFolder,
    check_sizes,
    damaged,
    model_class,
    read_folder,
    shapes_in,
)
from hipp_ext.plan import PlanGroup, PruningPlan
from hipp_ext.surgery.drop import layer_numbers, replace_modules, skip_modules
from hipp_ext.surgery.layer_config import (
    allot_caches_late,
    built_widths,
    configured_skips,
    quiet_width_warnings,
)
from hipp_ext.surgery.masks import PLAN_ATTRIBUTE
from hipp_ext.surgery.padding import known_towers, pad_to_uniform, resize, resized_shape

__all__ = ["load_pruned", "outline", "pad_to_uniform", "read_plan", "resolve_device", "save_pruned"]

PLAN = "hipp_plan.json"
# What is decided here, not by the caller: where the weights come from, and that no code comes
# with them.
_DECIDED = {
    "config",
    "state_dict",
    "subfolder",
    "gguf_file",
    "trust_remote_code",
    "use_safetensors",
    "weights_only",
    "local_files_only",
    "output_loading_info",
    "adapter_name",
    "adapter_kwargs",
}


def save_pruned(
    model: nn.Module, path: str | Path, processor: Any = None, *, overwrite: bool = False
) -> Path:
    """Write `model`, its plan and its processor to the folder `path`, whole or not at all.

    Args:
        model: from `prune` (a model that was never pruned is saved just as well).
        path: a folder that does not exist or is empty.
        processor: what belongs beside the weights (a processor, or a tokenizer for a language
            model). None: the one beside the weights that `model` was loaded from; where there is
            none, a warning says so.
        overwrite: replace what is at `path`; the old folder stays until the new one is complete.

    Returns:
        The folder.

    Raises:
        OutputExistsError: `path` exists, and `overwrite` is False.
        CalibrationError: the processor does not belong to the model.
        UnsupportedModelError: the model carries adapters, or its groups cannot be described.
            Nothing was written.
        WriteError: `path` cannot be written, or the disk is full.
    """
    from hipp_ext.calibration import check_processor, find_processor

    # What cannot be saved is refused before anything is written.
    check_saveable(model)
    require_new(path, overwrite)
    processor = processor or find_processor(model)
    if processor is None:
        warnings.warn(
            f"{path}: no processor was given and none lies beside the weights the model was loaded "
            "from; the folder "
            "cannot be evaluated until one is saved into it (save_pruned(..., processor=...)).",
            stacklevel=2,
        )
    else:
        check_processor(model, processor)
    with new_folder(path, overwrite) as folder:
        with settings_as_they_are(model):
            model.save_pretrained(folder)  # type: ignore[operator]
        if processor is not None:
            processor.save_pretrained(folder)
        complete_folder(model, folder)
    return Path(path)


def complete_folder(model: nn.Module, folder: Path) -> None:
    """Add to the folder that `model.save_pretrained` wrote what `load_pruned` needs: plan, widths,
    and, where the model was quantised, the names of the layers that were not."""
    plan = getattr(model, PLAN_ATTRIBUTE, None)
    if plan is not None:
        write_atomic(folder / PLAN, plan.to_json())
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise UnsupportedModelError(
            f"save_pretrained of {type(model).__name__} wrote no config.json or no safetensors "
            "weights."
        )
    manifest = Manifest(architecture=type(model).__name__, groups=_widths(model))
    write_atomic(folder / MANIFEST, manifest.model_dump_json(indent=1))
    _name_unquantised(model, folder / "config.json")


def _widths(model: nn.Module) -> list[GroupWidth]:
    """The width of every group, 0 for dropped blocks.

    Query heads and channels of experts are listed where KV groups and experts are smaller than the
    configuration says of all layers.
    """
    towers = known_towers(model)
    groups = find_groups(model, towers, partial="report")
    known = {g.name for g in groups}
    groups += tuple(
        g
        for g in query_groups(model, towers)
        if g.name not in known and not _as_configured(model, g)
    )
    config: Any = model.config.get_text_config()  # type: ignore[union-attr]
    channels = KINDS["expert_channels"].common_width(config, "language")
    groups += tuple(g for g in channel_groups(model, towers) if g.width != channels)
    widths = [GroupWidth(tower=g.tower, layer=g.layer, kind=g.kind, width=g.width) for g in groups]
    for tower in towers:
        widths += [
            GroupWidth(tower=tower, layer=layer, kind=kind, width=0)
            for layer, kind in find_skips(model, tower)
        ]
    seeing: list[Tower] = [tower for tower in towers if tower != "language"]
    stock = built_widths(model, seeing) if seeing else {}
    return [w.model_copy(update={"stock": stock.get(w.name)}) for w in widths]


def _as_configured(model: Any, queries: Group) -> bool:
    """Whether a block has as many query heads per KV group as the configuration of its tower says.

    Towers whose configuration names no KV heads have one each.
    """
    config = model.config.get_text_config() if queries.tower == "language" else None
    if config is not None and varies_by_itself(config):
        return False
    heads = getattr(config, "num_attention_heads", 1)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return queries.width * kv_heads == heads * queries.sections


def check_saveable(model: nn.Module) -> None:
    """Raise UnsupportedModelError where `model.save_pretrained` would not write the model itself.

    Of a model with adapters it writes the adapters alone.
    """
    adapters = [
        name or "the model"
        for name, m in model.named_modules()
        if type(m).__module__.partition(".")[0] == "peft"
    ]
    if adapters or getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(
            f"The model carries adapters ({', '.join(adapters[-3:]) or 'added by add_adapter'}), "
            "and would be saved without "
            "its own weights. Merge them first (model = model.merge_and_unload() of a PeftModel), "
            "or remove them. Nothing was "
            "written."
        )
    find_groups(model, partial="report")


@contextlib.contextmanager
def settings_as_they_are(model: Any) -> Iterator[None]:
    """Inside the block `model.save_pretrained` writes the generation settings without judging them.

    transformers loads settings such as a temperature without sampling (Vicuna's), and refuses to
    save them again.
    """
    from transformers import GenerationConfig

    class Unjudged(GenerationConfig):
        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
            self.to_json_file(
                Path(save_directory) / "generation_config.json", keys_to_pop=["compile_config"]
            )

    settings = getattr(model, "generation_config", None)
    if type(settings) is not GenerationConfig:
        yield
        return
    unjudged = copy.copy(settings)
    unjudged.__class__ = Unjudged
    model.generation_config = unjudged
    try:
        yield
    finally:
        model.generation_config = settings


def _name_unquantised(model: nn.Module, file: Path) -> None:
    """Add to the `ignore` of compressed-tensors in `file` every layer it leaves out, by its name in
    `model`.

    compressed-tensors lists them by their names in the checkpoint. Where transformers renames on
    loading, as for LLaVA, the list would match nothing, and layers without scales (the vision
    tower, the head) would be taken for quantised ones.
    """
    schemes = {name: getattr(m, "quantization_scheme", None) for name, m in model.named_modules()}
    kinds = tuple(
        {type(model.get_submodule(name)) for name, scheme in schemes.items() if scheme is not None}
    )
    if not kinds:
        return
    config = json.loads(file.read_text())
    quantisation = config["quantization_config"]
    left_out = [
        name for name, m in model.named_modules() if isinstance(m, kinds) and schemes[name] is None
    ]
    quantisation["ignore"] = list(dict.fromkeys([*(quantisation.get("ignore") or []), *left_out]))
    write_atomic(file, json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_pruned(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    **kwargs: Any,
) -> Any:
    """The model in the folder `path` in eval mode, its layers as wide as they were saved, logits
    the same to the bit.

    Also loads ordinary folders that were never pruned, and pruned models that something else saved
    (transformers' Trainer, `save_pretrained`): widths are those of the weights. Never runs code
    from the folder, and reads no pickled weights.

    Args:
        path: a folder written by `save_pruned`, or any transformers model folder.
        device: where to put it; None: the CPU, or what `device_map` says.
        dtype: type of the parameters, or its name ("bfloat16"); None or "auto": as saved.
            `torch_dtype` is the same.
        kwargs: for transformers' `from_pretrained`.

    Raises:
        CheckpointError: the folder or a file of it is missing, damaged, or of another format; or an
            option that cannot be honoured.
        MissingExtraError: the model was quantised by llm-compressor, and compressed-tensors is not
            installed.
        TypeError: an option that transformers does not know.
    """
    dtype = _resolve_dtype(dtype, kwargs.pop("torch_dtype", None))
    if refused := sorted(_DECIDED & set(kwargs)):
        raise CheckpointError(
            f"load_pruned does not take {', '.join(refused)}: it reads the safetensors of a "
            "folder, and no code."
        )
    if device is not None:
        if kwargs.get("device_map") is not None:
            raise CheckpointError("device and device_map say the same thing: give one of them.")
        resolve_device(str(device))
    quiet_width_warnings()
    folder = read_folder(path, kwargs.get("variant"))
    stored = model_class(folder)
    plan = read_plan(path)
    model = _from_pretrained(folder, _resizing(stored, folder, kwargs), dtype, kwargs)
    model.__class__ = stored
    _initialise_as_usual(model)
    if getattr(model.config.get_text_config(), "is_heterogeneous", False):
        allot_caches_late(model)
    if plan is not None and _belongs(plan, model, folder):
        setattr(model, PLAN_ATTRIBUTE, plan)
    return (model if device is None else model.to(device)).eval()


def _from_pretrained(
    folder: ModelFolder, builder: Any, dtype: torch.dtype | None, kwargs: dict[str, Any]
) -> Any:
    try:
        model, found = builder.from_pretrained(
            folder.path,
            dtype=dtype or "auto",
            local_files_only=True,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            **kwargs,
        )
    except (CheckpointError, torch.OutOfMemoryError):
        raise  # too small a device: nothing is wrong with the folder
    except ImportError as error:
        if "compressed-tensors" in str(error) or "compressed_tensors" in str(error):
            raise MissingExtraError(
                f"{folder.path} requires compressed-tensors, which", "llm-compressor"
            ) from error
        raise CheckpointError(
            f"{folder.path} needs a library that is not installed: {error}"
        ) from error
    except (
        Exception
    ) as error:  # safetensors, json and transformers raise half a dozen kinds for damaged files
        if isinstance(error, TypeError) and any(f"'{name}'" in str(error) for name in kwargs):
            raise  # an argument that no model takes
        raise damaged(folder.path, error) from error
    if found["missing_keys"]:
        raise CheckpointError(
            f"{folder.path} is incomplete: no weights for {sorted(found['missing_keys'])[:4]}."
        )
    return model


def outline(folder: ModelFolder) -> Any:
    """The model of a folder on the meta device: all of it but the numbers.

    Its layers are as wide as `load_pruned` would build them, by hipp_ext.json and config.json alone
    where the folder was read without its weights. It takes no memory.

    Raises:
        CheckpointError: the folder is damaged, or of a class that transformers does not have.
    """
    from transformers import AutoConfig

    quiet_width_warnings()
    stored = model_class(folder)
    try:
        config = AutoConfig.from_pretrained(
            folder.path, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            model = _resizing(stored, folder, {}, checked=bool(folder.shapes))._from_config(config)
    except CheckpointError:
        raise
    except Exception as error:  # as in _from_pretrained
        raise damaged(folder.path, error) from error
    model.__class__ = stored
    _initialise_as_usual(model)
    return model.eval()


def _resizing(
    stored: Any, folder: ModelFolder, kwargs: dict[str, Any], checked: bool = True
) -> Any:
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


def _spare_loaded_embeddings(model: nn.Module) -> None:
    """Until `_initialise_as_usual`, keep transformers from initialising embeddings that it loaded.

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


def _initialise_as_usual(model: nn.Module) -> None:
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


def _belongs(plan: PruningPlan, model: nn.Module, folder: ModelFolder) -> bool:
    """Whether `plan` may be the one that `model` was pruned by; something else may have saved
    another model over it.
    """
    found = (*_groups(model, folder), *_within(model, folder))
    groups = {(g.tower, g.layer, g.kind): g.width for g in found}
    numbers = layer_numbers(plan, len(tower_layers(model, "language")))

    def width(entry: PlanGroup) -> int:
        """Units in the model; none where the block, or its layer, is gone."""
        layer = numbers.get(entry.layer, -1) if entry.tower == "language" else entry.layer
        return groups.get((entry.tower, layer, entry.kind), 0)

    # All units are there where a plan only set them to zero.
    if all(width(e) in (e.keep, e.width) for e in plan.groups):
        return True
    warnings.warn(
        f"{folder.path / PLAN} is not the plan of the weights beside it, and is passed over.",
        stacklevel=3,
    )
    return False


def _empty(old: torch.Tensor, slices: Sequence[Slice], group: Group, width: int) -> torch.Tensor:
    shape = resized_shape(old.shape, slices, group, width)
    return torch.empty(shape, dtype=old.dtype, device=old.device)


def read_plan(path: str | Path) -> PruningPlan | None:
    """The plan saved in a model folder, or None where there is none."""
    file = Path(path) / PLAN
    return PruningPlan.load(file) if file.is_file() else None


def _resolve_dtype(dtype: Any, torch_dtype: Any) -> torch.dtype | None:
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise CheckpointError(
            f"dtype={dtype} and torch_dtype={torch_dtype} say different things: give one of them."
        )
    wanted = torch_dtype if dtype is None else dtype
    if wanted is None or wanted == "auto":
        return None
    found = (
        getattr(torch, wanted.removeprefix("torch."), None) if isinstance(wanted, str) else wanted
    )
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CheckpointError(
            f"dtype={wanted!r}: a floating-point torch.dtype or its name is needed, such as "
            "'bfloat16'."
        )
    return found


def resolve_device(device: str | None) -> str:
    """`device`, or the best there is for None.

    Raises:
        CheckpointError: no such device here.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"device {device!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from None
    return device
