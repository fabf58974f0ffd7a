"""A rank's compressor as a dictionary of tensors and plain types, and as a safetensors file; nothing is pickled."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from hipp_ext.comm.compressor import Compressor
from hipp_ext.errors import CompressionError
from hipp_ext.files import new_file

PARTS = ("memory", "factors")


class _Counts(BaseModel):
    model_config = ConfigDict(extra="forbid")
    steps: int = Field(default=0, ge=0)
    skipped_steps: int = Field(default=0, ge=0)
    bytes_sent: int = Field(default=0, ge=0)
    dense_bytes: int = Field(default=0, ge=0)
    loss_scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: Literal[1]
    workers: int = Field(ge=1)
    position: int = Field(ge=0)
    options: dict[str, int | float | str | None]
    counts: _Counts


def pack_state(compressor: Compressor, counts: Mapping[str, int | float]) -> dict[str, Any]:
    """Copies of the memory and the factors by parameter name, with what they belong to."""
    parts = {part: {n: t.clone() for n, t in getattr(compressor, part).items()} for part in PARTS}
    plain = {"workers": compressor.workers, "position": compressor.position, "options": compressor.options.plain()}
    return {"format": 1, **plain, "counts": dict(counts), **parts}


def unpack_state(compressor: Compressor, state: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Put a state into `compressor`, whole or not at all; returns its counts and, in words, what had to be dropped.

    Raises:
        CompressionError: the state is malformed, or of another rank, other parameters, or another rank of the factors.
    """
    try:
        plain = _Plain.model_validate({k: v for k, v in state.items() if k not in PARTS})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
        raise CompressionError(f"This is not a state of LQSGDState: {problems}") from None
    parts = {part: _checked(compressor, part, state.get(part)) for part in PARTS}
    dropped = []
    if plain.workers != compressor.workers:
        norm = sum(float(t.float().norm()) ** 2 for t in parts["memory"].values()) ** 0.5
        dropped.append(
            f"The state was saved with {plain.workers} workers and goes on with {compressor.workers}: the shared factors are "
            f"kept, this rank's memory of what was not sent yet (norm {norm:.3g}) is dropped."
        )
        parts["memory"] = {n: torch.zeros_like(t) for n, t in parts["memory"].items()}
    elif plain.position != compressor.position:
        raise CompressionError(
            f"The state was saved by rank {plain.position}, this is rank {compressor.position}: each rank saves and loads its "
            "own memory."
        )
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            getattr(compressor, part)[name].copy_(tensor)
    return plain.counts.model_dump(), dropped


def save_state(state: Any, path: str | Path) -> Path:
    """Write this rank's `LQSGDState` to a safetensors file, whole or not at all. Made of private gradients: keep it as such."""
    from safetensors.torch import save

    saved = state.state_dict()
    tensors = {f"{part}.{name}": t.contiguous().cpu() for part in PARTS for name, t in saved.pop(part).items()}
    with new_file(path) as file:
        file.write(save(tensors, {"lqsgd": json.dumps(saved)}))
    return Path(path)


def load_state(state: Any, path: str | Path) -> list[str]:
    """Read into `state` what `save_state` wrote on this rank; see `LQSGDState.load_state_dict`.

    Raises:
        CompressionError: the file is missing, damaged, or fits neither this rank nor these parameters.
    """
    from safetensors import SafetensorError, safe_open

    saved: dict[str, Any] = {part: {} for part in PARTS}
    try:
        with safe_open(path, "pt") as file:
            plain = json.loads((file.metadata() or {})["lqsgd"])
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                part, name = key.split(".", 1)
                saved[part][name] = file.get_tensor(key)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CompressionError(f"{path} is missing, damaged, or holds no LQ-SGD state: {error!r}") from error
    return state.load_state_dict({**plain, **saved})


def _checked(compressor: Compressor, part: str, given: Any) -> dict[str, Tensor]:
    own = getattr(compressor, part)
    if not isinstance(given, Mapping) or not all(isinstance(t, Tensor) for t in given.values()):
        raise CompressionError(f"This is not a state of LQSGDState: {part} is no dictionary of tensors.")
    if wrong := sorted({(n, tuple(t.shape)) for n, t in given.items()} ^ {(n, tuple(t.shape)) for n, t in own.items()})[:4]:
        raise CompressionError(f"The saved {part} belongs to other parameters or another rank; it differs in {wrong}.")
    if bad := [n for n, t in given.items() if not bool(t.isfinite().all())]:
        raise CompressionError(f"The saved {part} is not finite for {bad[:4]}.")
    return dict(given)
