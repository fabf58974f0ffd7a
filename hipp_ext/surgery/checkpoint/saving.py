"""Pruned models -> folders; nothing is written of a model that cannot be saved as it is."""

import contextlib
import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.families import varies_by_itself
from hipp_ext.files import new_folder, require_new, write_atomic
from hipp_ext.groups import (
    Group,
    Tower,
    channel_groups,
    find_groups,
    find_skips,
    known_towers,
    query_groups,
)
from hipp_ext.kinds import KINDS
from hipp_ext.model_folder import MANIFEST, GroupWidth, Manifest
from hipp_ext.surgery.layer_config import built_widths
from hipp_ext.surgery.masks import PLAN_ATTRIBUTE

PLAN = "hipp_plan.json"


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
