"""Calibration batches: what each must hold for its model, and their digest."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from hipp_ext.calibration.processors import image_token_id
from hipp_ext.errors import CalibrationError

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
    ids = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.numel() == 0:
        raise CalibrationError(
            f"Calibration batch {index} needs input_ids of shape (batch, tokens); it has "
            f"{sorted(batch)}."
        )
    _check_lengths(batch, index)
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    if int(ids.max()) >= rows or int(ids.min()) < 0:
        raise CalibrationError(
            f"Calibration batch {index} holds token ids from {int(ids.min())} to "
            f"{int(ids.max())}; the model has {rows}: a processor of another model?"
        )
    token = image_token_id(model)
    # Video-LLaVA calls its pictures pixel_values_images; videos have tokens of their own.
    has_pixels = any(
        k.startswith("pixel_values") and "video" not in k and v is not None
        for k, v in batch.items()
    )
    if token is not None and bool((ids == token).any()) != has_pixels:
        raise CalibrationError(
            f"Calibration batch {index} has {int((ids == token).sum())} image tokens (id {token}) "
            f"and {'pixel_values' if has_pixels else 'no pixel_values'}: a processor of another "
            "model?"
        )
    if has_pixels and token is None:
        raise CalibrationError(
            f"Calibration batch {index} has pixel_values, but {type(model).__name__} has no image "
            "token."
        )
    labels = batch.get("labels")
    if labels is not None and (
        int(labels.max()) >= rows or int(torch.where(labels == -100, 0, labels).min()) < 0
    ):
        raise CalibrationError(
            f"Calibration batch {index} has labels from {int(labels.min())} to "
            f"{int(labels.max())}; they are token ids below {rows}, or -100 where nothing is to be "
            "answered."
        )


def _check_lengths(batch: Batch, index: int) -> None:
    """Raise CalibrationError unless input_ids, attention_mask and labels have the same shape."""
    shape = tuple(batch["input_ids"].shape)
    for name in ("input_ids", "attention_mask", "labels"):
        value: Any = batch.get(name)
        if value is None:
            continue
        got = (
            f"shape {tuple(value.shape)}"
            if isinstance(value, torch.Tensor)
            else f"a {type(value).__name__}"
        )
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape:
            raise CalibrationError(
                f"Calibration batch {index} needs {name} of shape {shape}, as input_ids have; got "
                f"{got}."
            )
        if name != "attention_mask" and (value.is_floating_point() or value.dtype == torch.bool):
            raise CalibrationError(
                f"Calibration batch {index} needs {name} of whole numbers, not of {value.dtype}."
            )
        if name == "attention_mask" and not bool(value.bool().any(1).all()):
            raise CalibrationError(
                f"Calibration batch {index} has a row whose attention_mask leaves no token; leave "
                "it out."
            )
