"""Save and load pruned models whose layers differ in width; pad them for loaders that cannot.

A saved folder is a transformers folder (config.json with `per_layer_config`, safetensors, processor) plus
`hipp_ext.json`, which holds the widths of every group, and `hipp_plan.json`, the plan. Models that llm-compressor quantised
are saved and loaded likewise, with compressed weights.
"""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from hipp_ext.errors import CheckpointError, PlanError, UnsupportedModelError
from hipp_ext.files import new_folder, write_atomic
from hipp_ext.groups import Group, Kind, Tower, block_of, find_groups, linear, sync_sizes
from hipp_ext.plan import PruningPlan
from hipp_ext.surgery import PLAN_ATTRIBUTE, forget_bound_methods

MANIFEST, PLAN = "hipp_ext.json", "hipp_plan.json"


class _GroupWidth(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tower: Tower
    layer: int = Field(ge=0)
    kind: Kind
    width: int = Field(ge=1)


class _Manifest(BaseModel):
    """Contents of hipp_ext.json."""

    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = 1
    architecture: str
    groups: list[_GroupWidth]


def save_pruned(model: nn.Module, path: str | Path, processor: Any = None, *, overwrite: bool = False) -> Path:
    """Write `model`, its plan and its processor to the folder `path`, whole or not at all.

    Args:
        model: from `prune` (a model that was never pruned is saved just as well).
        path: a folder that does not exist or is empty.
        processor: what belongs beside the weights (a processor, or a tokenizer for a language model). None: the one
            beside the weights that `model` was loaded from; where there is none, a warning says so.
        overwrite: replace what is at `path`; the old folder stays until the new one is complete.

    Returns:
        The folder.

    Raises:
        OutputExistsError: `path` exists, and `overwrite` is False.
        CalibrationError: the processor does not belong to the model.
    """
    from hipp_ext.calibration import check_processor, find_processor

    processor = processor or find_processor(model)
    if processor is None:
        warnings.warn(
            f"{path}: no processor was given and none lies beside the weights the model was loaded from; the folder "
            "cannot be evaluated until one is saved into it (save_pruned(..., processor=...)).",
            stacklevel=2,
        )
    else:
        check_processor(model, processor)
    find_groups(model)  # what cannot be described is refused before anything is written
    with new_folder(path, overwrite) as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        if processor is not None:
            processor.save_pretrained(folder)
        complete_folder(model, folder)
    return Path(path)


def complete_folder(model: nn.Module, folder: Path) -> None:
    """Add to the folder that `model.save_pretrained` wrote what `load_pruned` needs: plan, widths, and, where the model was
    quantised, the names of the layers that were not."""
    plan = getattr(model, PLAN_ATTRIBUTE, None)
    if plan is not None:
        write_atomic(folder / PLAN, plan.to_json())
    groups = find_groups(model, _towers(model))
    manifest = _Manifest(
        architecture=type(model).__name__,
        groups=[_GroupWidth(tower=g.tower, layer=g.layer, kind=g.kind, width=g.width) for g in groups],
    )
    write_atomic(folder / MANIFEST, manifest.model_dump_json(indent=1))
    _name_unquantised(model, folder / "config.json")


def _name_unquantised(model: nn.Module, file: Path) -> None:
    """Add to the `ignore` of compressed-tensors in `file` every layer it leaves out, by its name in `model`.

    compressed-tensors lists them by their names in the checkpoint. Where transformers renames on loading, as for LLaVA, the
    list would match nothing, and layers without scales (the vision tower, the head) would be taken for quantised ones.
    """
    schemes = {name: getattr(m, "quantization_scheme", None) for name, m in model.named_modules()}
    kinds = tuple({type(model.get_submodule(name)) for name, scheme in schemes.items() if scheme is not None})
    if not kinds:
        return
    config = json.loads(file.read_text())
    quantisation = config["quantization_config"]
    left_out = [name for name, m in model.named_modules() if isinstance(m, kinds) and schemes[name] is None]
    quantisation["ignore"] = list(dict.fromkeys([*(quantisation.get("ignore") or []), *left_out]))
    write_atomic(file, json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_pruned(
    path: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None, **kwargs: Any
) -> Any:
    """The model in the folder `path` in eval mode, its layers as wide as they were saved, logits the same to the bit.

    Also loads ordinary folders that were never pruned.

    Args:
        path: a folder written by `save_pruned`, or any transformers model folder.
        device: where to put it; None: the CPU, or what `device_map` says.
        dtype: of the parameters; None: as they were saved.
        kwargs: for transformers' `from_pretrained`.

    Raises:
        CheckpointError: the folder or a file of it is missing, damaged, or of another format.
        ImportError: the model was quantised by llm-compressor, and compressed-tensors is not installed.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a model folder: it has no config.json.")
    manifest = _read_manifest(folder)
    model_class = _model_class(folder)
    builder = _resizing(model_class, manifest) if manifest is not None else model_class
    try:
        model, found = builder.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, output_loading_info=True, **kwargs
        )
    except (TypeError, ImportError, torch.OutOfMemoryError):
        raise  # wrong arguments, no compressed-tensors, too small a device: nothing is wrong with the folder
    except Exception as error:  # safetensors, json and transformers raise half a dozen kinds for damaged files
        raise CheckpointError(f"{folder} could not be loaded, it is incomplete or damaged: {error}") from error
    if found["missing_keys"]:
        raise CheckpointError(f"{folder} is incomplete: no weights for {sorted(found['missing_keys'])[:4]}.")
    model.__class__ = model_class
    plan = read_plan(folder)
    if plan is not None:
        setattr(model, PLAN_ATTRIBUTE, plan)
    return (model if device is None else model.to(device)).eval()


def pad_to_uniform(model: nn.Module) -> nn.Module:
    """A copy of `model` with zero units added until all layers are equally wide, for loaders that know one width only.

    Same logits (the added units contribute nothing); stock `from_pretrained` loads what its `save_pretrained` writes.
    The memory that heterogeneous widths save over uniform ones is given back.
    """
    model = copy.deepcopy(model)
    model.__dict__.pop(PLAN_ATTRIBUTE, None)
    forget_bound_methods(model)
    text_config: Any = model.config.get_text_config()  # type: ignore[union-attr]
    for tower in _towers(model):
        config: Any = text_config if tower == "language" else model.config.vision_config  # type: ignore[union-attr]
        groups = find_groups(model, (tower,))
        for kind in ("attention", "ffn"):
            members = [g for g in groups if g.kind == kind]
            width = max(g.width for g in members)
            if kind == "ffn":
                config.intermediate_size = width
            elif tower == "vision":
                width = config.num_attention_heads
            else:
                width = _loadable_kv_groups(config, width, repeat := members[0].columns // block_of(model, members[0]).head_dim)
                config.num_key_value_heads, config.num_attention_heads = width, width * repeat
            for g in members:
                _resize(model, g, width, _padded)
    text_config.per_layer_config = None
    text_config.allow_global_per_layer_attribute_access = False
    return model


def _loadable_kv_groups(config: Any, needed: int, repeat: int) -> int:
    """The least number of KV groups that is at least `needed` and that the config's own checks accept."""
    if getattr(config, "head_dim", None) is None:  # derived from the number of heads, which then cannot change
        return config.num_key_value_heads
    divides = (w for w in range(needed, config.num_key_value_heads) if config.hidden_size % (w * repeat) == 0)
    return next(divides, config.num_key_value_heads)


def _towers(model: nn.Module) -> tuple[Tower, ...]:
    """The towers whose widths can be told, whatever was pruned."""
    try:
        find_groups(model, ("vision",))
    except UnsupportedModelError:
        return ("language",)
    return ("language", "vision")


def _read_manifest(folder: Path) -> _Manifest | None:
    try:
        return _Manifest.model_validate_json((folder / MANIFEST).read_bytes(), strict=True)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()[:3])
        raise CheckpointError(f"{folder / MANIFEST} is damaged or of another format: {problems}") from None


def _model_class(folder: Path) -> Any:
    import transformers

    try:
        name = json.loads((folder / "config.json").read_text())["architectures"][0]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is damaged or names no architecture: {error!r}") from None
    model_class = getattr(transformers, str(name), None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise CheckpointError(f"{folder / 'config.json'} names the architecture {name!r}, which transformers does not have.")
    return model_class


def _resizing(model_class: Any, manifest: _Manifest) -> Any:
    """A subclass of `model_class` whose instances have the manifest's widths from the moment they are built."""
    widths = {f"{g.tower}.{g.layer}.{g.kind}": g.width for g in manifest.groups}
    towers: tuple = tuple(dict.fromkeys(g.tower for g in manifest.groups))

    def build(self: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        groups = find_groups(self, towers)
        if {g.name for g in groups} != set(widths):
            raise PlanError(f"{MANIFEST} lists other groups than the model has.")
        for g in groups:
            _resize(self, g, widths[g.name], _empty)

    # The same name, so that transformers takes it for the class that config.json names.
    return type(model_class.__name__, (model_class,), {"__init__": build, "__module__": model_class.__module__})


def _resize(model: nn.Module, group: Group, width: int, make: Callable[[nn.Parameter, tuple[int, ...]], torch.Tensor]) -> None:
    for name, size in zip(group.producers, group.rows, strict=True):
        producer = linear(model, name)
        _replace(producer, "weight", (width * size, producer.weight.shape[1]), make)
        if producer.bias is not None:
            _replace(producer, "bias", (width * size,), make)
    consumer = linear(model, group.consumer)
    _replace(consumer, "weight", (consumer.weight.shape[0], width * group.columns), make)
    sync_sizes(model, group, width)


def _replace(layer: nn.Linear, part: str, shape: tuple[int, ...], make: Callable) -> None:
    old = getattr(layer, part)
    if old.shape != shape:
        setattr(layer, part, nn.Parameter(make(old, shape), requires_grad=old.requires_grad))


def _empty(old: nn.Parameter, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=old.dtype, device=old.device)


def _padded(old: nn.Parameter, shape: tuple[int, ...]) -> torch.Tensor:
    new = old.new_zeros(shape)
    new[tuple(slice(s) for s in old.shape)] = old.data
    return new


def read_plan(path: str | Path) -> PruningPlan | None:
    """The plan saved in a model folder, or None where there is none."""
    file = Path(path) / PLAN
    return PruningPlan.load(file) if file.is_file() else None


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
        raise CheckpointError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device
