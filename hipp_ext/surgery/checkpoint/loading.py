"""Folders -> pruned models, as wide as they were saved."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hipp_ext.errors import CheckpointError, MissingExtraError
from hipp_ext.groups import tower_layers
from hipp_ext.model_folder import ModelFolder, damaged, model_class, read_folder
from hipp_ext.plan import PlanGroup, PruningPlan
from hipp_ext.surgery.checkpoint.saving import PLAN
from hipp_ext.surgery.checkpoint.widths import groups_in, initialise_as_usual, resizing
from hipp_ext.surgery.drop import layer_numbers
from hipp_ext.surgery.layer_config import allot_caches_late, quiet_width_warnings
from hipp_ext.surgery.masks import PLAN_ATTRIBUTE

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
    model = _from_pretrained(folder, resizing(stored, folder, kwargs), dtype, kwargs)
    model.__class__ = stored
    initialise_as_usual(model)
    if getattr(model.config.get_text_config(), "is_heterogeneous", False):
        allot_caches_late(model)
    if plan is not None and _belongs(plan, model, folder):
        setattr(model, PLAN_ATTRIBUTE, plan)
    return (model if device is None else model.to(device)).eval()


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
        raise CheckpointError(
            f"device {device!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from None
    return device


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
            model = resizing(stored, folder, {}, checked=bool(folder.shapes))._from_config(config)
    except CheckpointError:
        raise
    except Exception as error:  # as in _from_pretrained
        raise damaged(folder.path, error) from error
    model.__class__ = stored
    initialise_as_usual(model)
    return model.eval()


def _belongs(plan: PruningPlan, model: nn.Module, folder: ModelFolder) -> bool:
    """Whether `plan` may be the one that `model` was pruned by; something else may have saved
    another model over it.
    """
    found = groups_in(model, folder)
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
