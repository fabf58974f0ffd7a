"""What `hipp doctor` finds, as plain data for JSON."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from hipp_ext.budget import Bounds, max_ratio
from hipp_ext.budget.active import size_of
from hipp_ext.calibration import check_processor, find_processor, image_token_id, is_tokenizer
from hipp_ext.calibration.survey import survey
from hipp_ext.cli.installed import installed, missing_extras
from hipp_ext.errors import BudgetError, CheckpointError, HippError, UnsupportedModelError
from hipp_ext.evals.estimates import UTILISATION, estimate, measure_rate, row_tokens
from hipp_ext.groups import Group, find_groups, left_whole, left_whole_lines, total_parameters
from hipp_ext.integrations.serving import refusals_of_plans
from hipp_ext.kinds import KINDS
from hipp_ext.model_folder import ModelFolder, read_folder
from hipp_ext.surgery.checkpoint import outline

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
NOTHING: Mapping[str, Any] = MappingProxyType({})
NO_SHAPE = "its configuration can name no smaller width, and can leave out no layer"


def examine(
    path: str,
    *,
    rows: int,
    tokens: int,
    device: str,
    dtype: str | None = None,
    calibration: str | Mapping[str, str] | None = None,
    reading: Mapping[str, Any] = NOTHING,
) -> dict[str, Any]:
    """All that `hipp doctor` says of a model folder.

    Args:
        path: the folder; weights may be missing.
        rows, tokens: of the calibration, which the estimates assume; `rows` are read of a file.
        device: where the estimates are for.
        dtype: type of the weights; None: as stored.
        calibration: file of calibration data to look into, or a file for each task; None: none.
        reading: further arguments of `survey` for it.

    Raises:
        CheckpointError: the folder is no model, or its configuration is damaged.
        DataError: a calibration file does not exist.
    """
    folder, problem = _read(Path(path))
    model = outline(folder)
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    size = size_of(model)
    parts = [_tower(model, tower) for tower in _towers(model)]
    groups: tuple[Group, ...] = sum((part.pop("found") for part in parts), ())
    language = tuple(g for g in groups if g.tower == "language")
    quantisation = folder.config.get("quantization_config") or {}
    processor = _processor_of(model)
    surveys = [survey(model, processor, file, rows=rows, **reading) for file in _files(calibration)]
    usable = [one for one in surveys if one.usable and one.problem is None]
    length = row_tokens(model, tokens)
    if usable:
        rows = sum(one.usable for one in usable)
        length = math.ceil(sum(one.tokens for one in usable) / rows)
    return {
        "folder": str(path),
        "architecture": type(model).__name__,
        "parameters": size.parameters,
        "active_parameters": size.active,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights_bytes": sum(p.nbytes for p in model.parameters()),
        "weights_problem": problem,
        "tied": _tied(model),
        "quantisation": quantisation.get("quant_method", "unknown") if quantisation else None,
        "already_pruned": folder.manifest is not None,
        "processor": _described(model, processor),
        "calibration": [asdict(one) for one in surveys],
        "towers": parts,
        "prunable_parameters": total_parameters(language),
        "largest_pruning_ratio": max_ratio(language) if language else 0.0,
        "rows": rows,
        "tokens": length,
        **(_estimates(model, language, rows, length, device) if language else {}),
        "runtimes": _runtimes(model, language) if language else {},
        "installed": installed(),
        "missing_extras": missing_extras(),
    }


def _read(path: Path) -> tuple[ModelFolder, str | None]:
    """The folder, and what is wrong with its weights."""
    try:
        return read_folder(path), None
    except CheckpointError as error:
        folder = read_folder(path, weights=False)
        none = not any(p.suffix in WEIGHTS for p in path.iterdir())
        return folder, "none lie in the folder; shapes are config.json's" if none else str(error)


def _towers(model: Any) -> Sequence[Any]:
    seeing = getattr(model.config, "vision_config", None) is not None
    return ("language", "vision", "projector") if seeing else ("language",)


def _tower(model: Any, tower: Any) -> dict[str, Any]:
    """The groups of a tower by kind, and what is left whole; or why it has none."""
    try:
        groups = find_groups(model, (tower,), partial="report")
        left = left_whole_lines(left_whole(model, (tower,)))
    except UnsupportedModelError as error:
        return {"tower": tower, "kinds": [], "left_whole": [], "refused": str(error), "found": ()}
    kinds = dict.fromkeys(g.kind for g in groups)
    return {
        "tower": tower,
        "kinds": [_kind(kind, [g for g in groups if g.kind == kind]) for kind in kinds],
        "left_whole": left,
        "refused": None,
        "found": groups,
    }


def _kind(kind: Any, groups: Sequence[Group]) -> dict[str, Any]:
    widths = [g.width for g in groups]
    return {
        "kind": kind,
        "unit": KINDS[kind].unit,
        "groups": len(groups),
        "least_units": min(widths),
        "most_units": max(widths),
        "parameters": total_parameters(groups),
    }


def _tied(model: Any) -> list[list[str]]:
    """Names of parameters that are one and the same."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [alike for alike in names.values() if len(alike) > 1]


def _processor_of(model: Any) -> Any:
    """The processor or tokenizer in the folder; None: there is none."""
    folder = Path(model.config.name_or_path)
    # Without any file transformers makes a tokenizer of no words.
    there = any((folder / name).is_file() for name in TOKENIZERS)
    return find_processor(model) if there else None


def _described(model: Any, processor: Any) -> dict[str, str | None]:
    """Class of the processor or tokenizer, which of the two it is, and what is wrong with it."""
    is_text = is_tokenizer(processor) if processor else image_token_id(model) is None
    known = {"kind": "tokenizer" if is_text else "processor"}
    try:
        check_processor(model, processor)
    except HippError as error:
        problem = str(error) if processor else "none lies in the folder"
        return (
            known
            | {"class": type(processor).__name__ if processor else None}
            | {"problem": problem}
        )
    return known | {"class": type(processor).__name__, "problem": None}


def _files(calibration: str | Mapping[str, str] | None) -> Sequence[str]:
    """The files, each once."""
    if isinstance(calibration, Mapping):
        return list(dict.fromkeys(calibration.values()))
    return [calibration] if calibration else []


def _estimates(
    model: Any, groups: Sequence[Group], rows: int, tokens: int, device: str
) -> dict[str, Any]:
    rate = UTILISATION * measure_rate(device, model.dtype)
    if torch.device(device).type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "device": device,
        "device_bytes": memory,
        "flops_per_second": rate,
        "estimates": [
            {
                "command": one.command,
                "flops": one.flops,
                "seconds": one.flops / rate,
                "bytes": one.bytes,
            }
            for one in estimate(model, groups, rows, tokens)
        ],
    }


def _runtimes(model: Any, groups: Sequence[Group]) -> Mapping[str, Mapping[str, Sequence[str]]]:
    """Runtime -> shape of the plan -> why the runtime would not take the pruned model."""
    found: dict[str, dict[str, Sequence[str]]] = {}
    possible = _can_be_alike(groups)
    for runtime, reasons in refusals_of_plans(model.config).items():
        alike = reasons["alike"] if possible else (NO_SHAPE,)
        found[runtime] = {"free": list(reasons["free"]), "stock": list(alike)}
    return found


def _can_be_alike(groups: Sequence[Group]) -> bool:
    """Whether a plan can leave all layers of a shape that the configuration names."""
    if any(g.removable for g in groups):
        return True
    try:
        return any(len(part.counts) > 1 for part in Bounds(shape="uniform").uniform_parts(groups))
    except BudgetError:
        return False
