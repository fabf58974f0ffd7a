"""A rank's compressor as a dictionary of tensors and plain types, and as a sealed file."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from hipp_ext.comm.compressor import Compressor
from hipp_ext.errors import CheckpointError, CompressionError
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import seal, unseal

PARTS = ("residual", "factors")
MAX_COUNT = 2**63 - 1


class Counts(BaseModel):
    """What a rank has done so far."""

    model_config = ConfigDict(extra="forbid", strict=True)
    steps: int = Field(default=0, ge=0, le=MAX_COUNT)
    skipped_steps: int = Field(default=0, ge=0, le=MAX_COUNT)
    bytes_sent: int = Field(default=0, ge=0, le=MAX_COUNT)
    dense_bytes: int = Field(default=0, ge=0, le=MAX_COUNT)
    loss_scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)


class Plain(BaseModel):
    """A saved state without its tensors."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal[1]
    workers: int = Field(ge=1, le=MAX_COUNT)
    position: int = Field(ge=0, le=MAX_COUNT)
    options: dict[str, int | float | str]
    counts: Counts


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """A state that was read and is complete; it may belong to another rank or model.

    Attributes:
        plain: its owner and its counts.
        residual: name -> what was not sent yet; None stands for zeros.
        factors: name -> shared factor.
    """

    plain: Plain
    residual: dict[str, Tensor] | None
    factors: dict[str, Tensor]


def pack_state(compressor: Compressor, counts: Counts) -> dict[str, Any]:
    """Copies of residual and factors by parameter name, with their owner and counts."""
    return {
        "format": 1,
        "workers": compressor.workers,
        "position": compressor.position,
        "options": compressor.options.plain(),
        "counts": counts.model_dump(),
        **{part: {n: t.clone() for n, t in getattr(compressor, part).items()} for part in PARTS},
    }


def parse_state(state: Mapping[str, Any]) -> SavedState:
    """The result of `pack_state`, checked as far as possible without a compressor.

    Raises:
        CompressionError: the state is malformed, or not finite.
    """
    if not isinstance(state, Mapping):
        raise CompressionError(
            f"This is not a state of LQSGDState: {type(state).__name__} instead of a dictionary."
        )
    try:
        plain = Plain.model_validate({k: v for k, v in state.items() if k not in PARTS})
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3]
        )
        raise CompressionError(f"This is not a state of LQSGDState: {problems}") from None
    return SavedState(plain=plain, **{part: _tensors(part, state.get(part)) for part in PARTS})


def check_fit(compressor: Compressor, saved: SavedState) -> None:
    """Raise CompressionError if `saved` has other parameters, or factors of another rank."""
    for part in PARTS:
        own, given = getattr(compressor, part), getattr(saved, part)
        if given is None:
            continue
        shapes = [{(n, tuple(t.shape)) for n, t in tensors.items()} for tensors in (given, own)]
        if wrong := sorted(shapes[0] ^ shapes[1])[:4]:
            raise CompressionError(
                f"The saved {part} belongs to other parameters or factors of another rank; it "
                f"differs in {wrong}."
            )


def put_state(compressor: Compressor, saved: SavedState) -> list[str]:
    """Copy a state that fits into `compressor`; nothing is dropped."""
    for name, factor in saved.factors.items():
        compressor.factors[name].copy_(factor)
    for name, residual in compressor.residual.items():
        residual.zero_() if saved.residual is None else residual.copy_(saved.residual[name])
    return []


def unpack_state(compressor: Compressor, saved: SavedState, *, is_copy: bool = False) -> list[str]:
    """Copy a state into `compressor`, completely or not at all; returns lines on what was dropped.

    Args:
        compressor: compressor of this rank.
        saved: the state.
        is_copy: whether it is the state of a copied LQSGDState, which may be another rank's.

    Raises:
        CompressionError: the state belongs to another rank or other parameters, or its factors
            have another rank.
    """
    check_fit(compressor, saved)
    workers, position = saved.plain.workers, saved.plain.position
    if workers != compressor.workers:
        norm = sum(float(t.float().norm()) ** 2 for t in (saved.residual or {}).values()) ** 0.5
        put_state(compressor, replace(saved, residual=None))
        return [
            f"The state was saved with {workers} workers and goes on with {compressor.workers}: "
            f"the shared factors are kept, this rank's residual (norm {norm:.3g}) is dropped."
        ]
    if position == compressor.position:
        return put_state(compressor, saved)
    if is_copy:
        put_state(compressor, saved)
        return [
            f"This LQSGDState is a copy of rank {position}'s, used by rank "
            f"{compressor.position}, including its residual."
        ]
    raise CompressionError(
        f"The state was saved by rank {position}, this is rank {compressor.position}: each rank "
        "saves and loads its own residual."
    )


def save_state(state: Any, path: str | Path) -> Path:
    """Write this rank's `LQSGDState` to a safetensors file, completely or not at all.

    The residual is made of private gradients: protect the file like the training data.
    """
    saved = state.state_dict()
    parts = {part: saved.pop(part) for part in PARTS}
    tensors = {f"{part}.{name}": t for part in PARTS for name, t in parts[part].items()}
    write_atomic(path, seal(tensors, saved))
    return Path(path)


def load_state(state: Any, path: str | Path) -> list[str]:
    """Read into `state` what `save_state` wrote on this rank; see `LQSGDState.load_state_dict`.

    Raises:
        CompressionError: the file is missing, damaged, or does not fit this rank or its
            parameters.
    """
    return state.load_state_dict(read_state(path))


def read_state(path: str | Path) -> dict[str, Any]:
    """The contents of a file of `save_state`, as `LQSGDState.state_dict` returned them.

    Raises:
        CompressionError: the file is missing, damaged, or something else.
    """
    saved: dict[str, Any] = {part: {} for part in PARTS}
    try:
        tensors, plain = unseal(Path(path))
        for key, tensor in tensors.items():
            part, name = key.split(".", 1)
            saved[part][name] = tensor
    except (CheckpointError, ValueError, KeyError) as error:
        raise CompressionError(
            f"{path} is missing, damaged, or holds no LQ-SGD state: {error}"
        ) from error
    return plain | saved


def _tensors(part: str, given: Any) -> dict[str, Tensor]:
    if not isinstance(given, Mapping) or not all(
        isinstance(n, str) and isinstance(t, Tensor) for n, t in given.items()
    ):
        raise CompressionError(
            f"This is not a state of LQSGDState: {part!r} must be a dict of tensors, got "
            f"{type(given).__name__}."
        )
    for name, t in given.items():
        if t.dtype != torch.float32 or t.layout != torch.strided or t.is_meta:
            raise CompressionError(
                f"The saved {part} of {name} is {t.layout}, {t.dtype}: dense float32 is needed."
            )
    if bad := [n for n, t in given.items() if not bool(t.isfinite().all())]:
        raise CompressionError(f"The saved {part} is not finite for {bad[:4]}.")
    return {n: t.detach() for n, t in given.items()}
