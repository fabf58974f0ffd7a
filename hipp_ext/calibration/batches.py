"""Calibration batches: what each must hold for its model, and their digest."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from hipp_ext.calibration.processors import image_token_id
from hipp_ext.errors import CalibrationError
from hipp_ext.families import PICTURES

Task = Literal["utility", "robustness"]
TASKS: tuple[Task, ...] = get_args(Task)
Batch = dict[str, torch.Tensor]
Batches = Iterable[Mapping[str, torch.Tensor]]


def batches_digest(batches: Iterable[Batch]) -> str:
    """Hex digest of the batches: names, types, shapes and values."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            if isinstance(value, torch.Tensor):
                digest.update(f"\0{name} {value.dtype} {tuple(value.shape)}\0".encode())
                digest.update(
                    value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                )
            else:  # some processors add plain values: the mode of Janus, for one
                digest.update(f"\0{name} {value!r}\0".encode())
    return digest.hexdigest()


def check_batch(model: nn.Module, batch: Batch, index: int) -> None:
    """Raise CalibrationError unless the batch, which is number `index`, fits the model."""
    if wrong := _wrong_shape(batch) or _wrong_for(model, batch):
        raise CalibrationError(f"Calibration batch {index} {wrong}")


def _wrong_for(model: nn.Module, batch: Batch) -> str:
    """What keeps the batch from being one of this model; empty: nothing."""
    ids, labels, token = batch["input_ids"], batch.get("labels"), image_token_id(model)
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    if int(ids.max()) >= rows or int(ids.min()) < 0:
        return (
            f"holds token ids from {int(ids.min())} to {int(ids.max())}; the model has {rows}: a "
            "processor of another model?"
        )
    # Videos have tokens of their own.
    has_pixels = any(batch.get(name) is not None for name in PICTURES)
    if token is not None and bool((ids == token).any()) != has_pixels:
        return (
            f"has {int((ids == token).sum())} image tokens (id {token}) and "
            f"{'pixel_values' if has_pixels else 'no pixel_values'}: a processor of another model?"
        )
    if has_pixels and token is None:
        return f"has pixel_values, but {type(model).__name__} has no image token."
    if labels is not None and (
        int(labels.max()) >= rows or int(torch.where(labels == -100, 0, labels).min()) < 0
    ):
        return (
            f"has labels from {int(labels.min())} to {int(labels.max())}; they are token ids below "
            f"{rows}, or -100 where nothing is to be answered."
        )
    return ""


def _wrong_shape(batch: Batch) -> str:
    """What is wrong with input_ids, or with attention_mask and labels beside them."""
    ids: Any = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.numel() == 0:
        return f"needs input_ids of shape (batch, tokens); it has {sorted(batch)}."
    shape = tuple(ids.shape)
    for name in ("input_ids", "attention_mask", "labels"):
        value: Any = batch.get(name)
        if value is None:
            continue
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape:
            tensor = isinstance(value, torch.Tensor)
            got = f"shape {tuple(value.shape)}" if tensor else f"a {type(value).__name__}"
            return f"needs {name} of shape {shape}, as input_ids have; got {got}."
        if name != "attention_mask" and (value.is_floating_point() or value.dtype == torch.bool):
            return f"needs {name} of whole numbers, not of {value.dtype}."
        if name == "attention_mask" and not bool(value.bool().any(1).all()):
            return "has a row whose attention_mask leaves no token; leave it out."
    return ""
