"""Which model something was measured on: digests of its groups, weights and configuration."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hipp_ext.groups import Group

# Of a configuration: where the model lay and who wrote it, which change no output.
_NOT_COUNTED = ("_name_or_path", "transformers_version")


def model_digest(model: nn.Module, groups: Sequence[Group]) -> str:
    """Hex digest of the groups and of a sample of all weights; signals belong to one of them."""
    digest = hashlib.sha256(repr(groups).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        if not parameter.is_meta:  # offloaded
            weight = parameter.detach().flatten()
            # An odd stride walks over rows and columns.
            digest.update(
                weight[:: max(1, weight.numel() // 64) | 1].float().cpu().numpy().tobytes()
            )
    return digest.hexdigest()


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """Hex digest of every weight and buffer with its type, and of the configuration.

    What is kept on disk for a later process belongs to one of them. Each row of a tensor is hashed
    where it lies, and only the hashes are moved: a model of 7 billion parameters takes seconds. The
    hash of a row does not depend on the order of its values; `model_digest` samples the order.
    """
    config = getattr(model, "config", None)
    known = _plain(config.to_dict()) if config is not None else None
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=repr).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta and tensor.numel():  # offloaded
            digest.update(_condensed(tensor.detach()).cpu().numpy().tobytes())
    return digest.hexdigest()


def _condensed(tensor: Tensor) -> Tensor:
    """A vector as it is, and of what has more dimensions a hash of each row."""
    if tensor.device.type not in ("cpu", "cuda"):  # others have no hashes
        tensor = tensor.cpu()
    if tensor.is_floating_point() and (tensor.ndim < 2 or tensor.element_size() == 1):
        tensor = tensor.float()  # numpy has no bfloat16, and there are no hashes of float8
    return tensor if tensor.ndim < 2 else torch.hash_tensor(tensor.flatten(1), dim=1)


def _plain(value: Any) -> Any:
    """The values of a configuration that change what a model computes, in any depth."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if k not in _NOT_COUNTED}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
