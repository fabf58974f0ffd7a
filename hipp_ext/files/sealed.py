"""Tensors in a safetensors file with a digest: damage to the file is an error, not another number.

The digest is no signature.
"""

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

# One metadata entry: safetensors keeps no order of several, and equal contents give equal bytes.
ENTRY = "sealed"
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
    """A safetensors file of `tensors` with `about`, plain JSON values, and the digest of both."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = json.loads(json.dumps(about or {}))
    entry = json.dumps({"about": about, "sha256": digest(plain, about)})
    return safetensors.torch.save(plain, {ENTRY: entry})


def unseal(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, about) of a file that `seal` made.

    Raises:
        CheckpointError: the file cannot be read, or its contents have another digest.
    """
    if not path.is_file():  # opening a pipe would block
        raise CheckpointError(f"{path} is missing." if not path.exists() else f"{path} is no file.")
    try:
        with safetensors.safe_open(path, "pt") as file:
            entry = json.loads(file.metadata()[ENTRY])
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        about, sealed = entry["about"], entry["sha256"]
        same = sealed == digest(tensors, about) and isinstance(about, dict)
    except (*UNREADABLE, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}.") from None
    if not same:
        raise CheckpointError(
            f"{path} is damaged: its contents do not have the digest that it was written with."
        )
    return tensors, about


def text_digest(text: str) -> str:
    """SHA-256 (hex) of a text, for files without tensors."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest(tensors: Mapping[str, Tensor], about: Any = None) -> str:
    """SHA-256 (hex) of names, types, shapes and contents of tensors, and of JSON values.

    The order of the tensors does not matter.
    """
    table = [
        (name, str(tensors[name].dtype), list(tensors[name].shape)) for name in sorted(tensors)
    ]
    found = hashlib.sha256(json.dumps([about, table], sort_keys=True).encode())
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()
