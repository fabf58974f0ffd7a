"""A rank's compressor as a dictionary of tensors and plain types, and as a safetensors file; nothing is pickled.

The file's digest is over all that is read from it, so that a damaged one is not taken for another state. It is no signature.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from hipp_ext.comm.compressor import Compressor
from hipp_ext.errors import CompressionError
from hipp_ext.files import new_file

PARTS = ("memory", "factors")
_MOST = 2**63 - 1
_HEADER = 1 << 20, 4096  # bytes of a file's header: in any case, and per tensor


class Counts(BaseModel):
    """What a rank has done so far."""

    model_config = ConfigDict(extra="forbid", strict=True)
    steps: int = Field(default=0, ge=0, le=_MOST)
    skipped_steps: int = Field(default=0, ge=0, le=_MOST)
    bytes_sent: int = Field(default=0, ge=0, le=_MOST)
    dense_bytes: int = Field(default=0, ge=0, le=_MOST)
    loss_scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)


class Plain(BaseModel):
    """All of a state but its tensors."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal[1]
    workers: int = Field(ge=1, le=_MOST)
    position: int = Field(ge=0, le=_MOST)
    options: dict[str, int | float | str | None]
    counts: Counts


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """A state that was read and is whole, but need not fit this rank.

    Attributes:
        plain: whose it is, and its counts.
        memory: name -> what was not sent yet; None: empty, to be taken as zeros.
        factors: name -> shared factor.
    """

    plain: Plain
    memory: dict[str, Tensor] | None
    factors: dict[str, Tensor]


def pack_state(compressor: Compressor, counts: Mapping[str, int | float]) -> dict[str, Any]:
    """Copies of the memory and the factors by parameter name, with what they belong to."""
    parts = {part: {n: t.clone() for n, t in getattr(compressor, part).items()} for part in PARTS}
    plain = {
        "workers": compressor.workers,
        "position": compressor.position,
        "options": compressor.options.plain(),
    }
    return {"format": 1, **plain, "counts": dict(counts), **parts}


def parse_state(state: Mapping[str, Any]) -> SavedState:
    """What `pack_state` returned, checked as far as it can be without a compressor.

    Raises:
        CompressionError: it is malformed, or not finite.
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
    """Raise CompressionError where `saved` is of other parameters, or another rank of the factors."""
    for part in PARTS:
        own, given = getattr(compressor, part), getattr(saved, part)
        if given is not None:
            wrong = sorted(
                {(n, tuple(t.shape)) for n, t in given.items()}
                ^ {(n, tuple(t.shape)) for n, t in own.items()}
            )[:4]
            if wrong:
                raise CompressionError(
                    f"The saved {part} belongs to other parameters or another rank; it differs in {wrong}."
                )


def put_state(compressor: Compressor, saved: SavedState) -> None:
    """Put a state that fits into `compressor`."""
    for name, factor in saved.factors.items():
        compressor.factors[name].copy_(factor)
    for name, memory in compressor.memory.items():
        memory.zero_() if saved.memory is None else memory.copy_(saved.memory[name])


def unpack_state(
    compressor: Compressor, state: Mapping[str, Any] | SavedState
) -> tuple[dict[str, Any], list[str]]:
    """Put a state into `compressor`, whole or not at all; returns its counts and, in words, what had to be dropped.

    Raises:
        CompressionError: the state is malformed, or of another rank, other parameters, or another rank of the factors.
    """
    saved = state if isinstance(state, SavedState) else parse_state(state)
    check_fit(compressor, saved)
    workers, dropped = saved.plain.workers, []
    if workers != compressor.workers:
        norm = sum(float(t.float().norm()) ** 2 for t in (saved.memory or {}).values()) ** 0.5
        dropped.append(
            f"The state was saved with {workers} workers and goes on with {compressor.workers}: the shared factors are "
            f"kept, this rank's memory of what was not sent yet (norm {norm:.3g}) is dropped."
        )
    elif saved.plain.position != compressor.position:
        raise CompressionError(
            f"The state was saved by rank {saved.plain.position}, this is rank {compressor.position}: each rank saves and "
            "loads its own memory."
        )
    put_state(compressor, replace(saved, memory=None) if dropped else saved)
    return saved.plain.counts.model_dump(), dropped


def save_state(state: Any, path: str | Path) -> Path:
    """Write this rank's `LQSGDState` to a safetensors file, whole or not at all. Made of private gradients: keep it as such."""
    from safetensors.torch import save

    saved = state.state_dict()
    tensors = {
        f"{part}.{name}": t.contiguous().cpu()
        for part in PARTS
        for name, t in saved.pop(part).items()
    }
    plain = json.dumps(saved)
    with new_file(path) as file:
        file.write(save(tensors, {"lqsgd": plain, "sha256": digest_of(tensors, plain)}))
    return Path(path)


def load_state(state: Any, path: str | Path) -> list[str]:
    """Read into `state` what `save_state` wrote on this rank; see `LQSGDState.load_state_dict`.

    Raises:
        CompressionError: the file is missing, damaged, or fits neither this rank nor these parameters.
    """
    return state.load_state_dict(read_state(path))


def read_state(path: str | Path) -> dict[str, Any]:
    """What `save_state` wrote, as `LQSGDState.state_dict` returned it. Takes no more memory than the file has bytes.

    Raises:
        CompressionError: the file is missing, damaged, or no such file.
    """
    from safetensors import SafetensorError, safe_open

    saved: dict[str, Any] = {part: {} for part in PARTS}
    try:
        _check_header(Path(path))
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 (not a mapping)
            if bad := [key for key, kind in kinds.items() if kind != "F32"][:4]:
                raise ValueError(f"{bad} are not of float32")
            tensors = {key: file.get_tensor(key) for key in kinds}
        plain = json.loads(metadata["lqsgd"])
        for key, tensor in tensors.items():
            part, name = key.split(".", 1)
            saved[part][name] = tensor
        if "sha256" in metadata and metadata["sha256"] != digest_of(tensors, metadata["lqsgd"]):
            raise ValueError("its contents do not have the digest that was written with them")
        state = {**plain, **saved}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CompressionError(
            f"{path} is missing, damaged, or holds no LQ-SGD state: {error!r}"
        ) from error
    if "sha256" not in metadata:
        warnings.warn(
            f"{path} was written by an earlier version, without a digest: damage to it goes unnoticed.",
            stacklevel=3,
        )
    return state


def _check_header(path: Path) -> None:
    """Before a library reads it: a file, not a device or a pipe, whose header is no larger than any that was written."""
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _HEADER[0]:
            tensors = file.read(min(size, path.stat().st_size)).count(b'"data_offsets"')
            if size > _HEADER[0] + _HEADER[1] * tensors:
                raise ValueError(f"its header has {size} bytes for {tensors} tensors")


def digest_of(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 (hex) of names, shapes and contents of float32 tensors, and of a text; the order does not matter."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(json.dumps([name, list(tensors[name].shape)]).encode())
        digest.update(tensors[name].contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _tensors(part: str, given: Any) -> dict[str, Tensor]:
    if not isinstance(given, Mapping) or not all(
        isinstance(n, str) and isinstance(t, Tensor) for n, t in given.items()
    ):
        raise CompressionError(
            f"This is not a state of LQSGDState: {part} is no dictionary of tensors."
        )
    if bad := [
        n
        for n, t in given.items()
        if t.dtype != torch.float32 or t.layout != torch.strided or t.is_meta
    ]:
        kind = given[bad[0]]
        raise CompressionError(
            f"The saved {part} holds {kind.layout}, {kind.dtype} for {bad[:4]}: dense float32 is needed."
        )
    if bad := [n for n, t in given.items() if not bool(t.isfinite().all())]:
        raise CompressionError(f"The saved {part} is not finite for {bad[:4]}.")
    return {n: t.detach() for n, t in given.items()}
