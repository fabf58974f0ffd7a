"""Tensors in a file that knows its own digest: a flipped bit is an error, and never another number."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from hipp_ext.errors import CheckpointError

ENTRY = "sealed"  # one entry: safetensors keeps no order of several, and equal contents should be equal bytes
UNREADABLE = (
    OSError,
    safetensors.SafetensorError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    AttributeError,
)


def seal(tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> bytes:
    """A safetensors file of `tensors` with `about`, plain JSON values, and the digest of both in its metadata."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = json.loads(json.dumps(about or {}))
    entry = json.dumps({"about": about, "sha256": _digest(plain, about)})
    return safetensors.torch.save(plain, {ENTRY: entry})


def unseal(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, about) of the file that `seal` made.

    Raises:
        CheckpointError: it cannot be read, or its contents are not those that were sealed.
    """
    if not path.is_file():  # a pipe would block
        raise CheckpointError(f"{path} is missing." if not path.exists() else f"{path} is no file.")
    try:
        with safetensors.safe_open(path, "pt") as file:
            entry = json.loads(file.metadata()[ENTRY])
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        about, digest = entry["about"], entry["sha256"]
        same = digest == _digest(tensors, about) and isinstance(about, dict)
    except (*UNREADABLE, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}.") from None
    if not same:
        raise CheckpointError(
            f"{path} is damaged: its contents do not have the digest that it was written with."
        )
    return tensors, about


def text_digest(text: str) -> str:
    """Hex digest of a text, for files that are not tensors."""
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor], about: Any) -> str:
    table = [
        (name, str(tensors[name].dtype), list(tensors[name].shape)) for name in sorted(tensors)
    ]
    digest = hashlib.sha256(json.dumps([about, table], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
