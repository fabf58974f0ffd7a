"""What a run is made of, in plain values: where they are the same, a stopped run goes on; where not, it belongs to another."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from hipp_ext.robust.data import ImageData

DEEPEST = 8  # levels of values within values that are looked at


def data_identity(data: ImageData) -> dict[str, Any]:
    """The training images and their labels, all of them."""
    train = {"images": data.train.images, "labels": data.train.labels}
    return {
        "name": data.name,
        "rows": len(data.train),
        "digest": digest(train),
        "pad": data.pad,
        "mirror": data.mirror,
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Hex digest of names, shapes and values."""
    result = hashlib.sha256()
    for name, tensor in tensors.items():
        result.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        result.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return result.hexdigest()


def describe(value: Any, depth: int = 0) -> Any:
    """A loss, or what it is made of, in values that JSON can hold and that no address is part of.

    Functions count by module, name, code, defaults and what they enclose, objects by class and attributes. Global variables
    that a function reads are not seen.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth == DEEPEST:
        return type(value).__qualname__
    inner = functools.partial(describe, depth=depth + 1)
    if isinstance(value, Mapping):
        return {str(k): inner(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [
            inner(v)
            for v in (sorted(value, key=repr) if isinstance(value, set | frozenset) else value)
        ]
    if isinstance(value, Tensor):
        return digest({"": value})
    if isinstance(value, nn.Module):
        return [_name(type(value)), digest(value.state_dict())]
    if isinstance(value, functools.partial):
        return ["partial", inner(value.func), inner(value.args), inner(value.keywords)]
    if isinstance(value, MethodType):
        return [inner(value.__func__), inner(value.__self__)]
    if isinstance(value, FunctionType):
        enclosed = [c.cell_contents for c in value.__closure__ or ()]
        return [
            _name(value),
            _code(value.__code__),
            *map(inner, (value.__defaults__, value.__kwdefaults__, enclosed)),
        ]
    if isinstance(value, type | BuiltinFunctionType):
        return _name(value)
    if dataclasses.is_dataclass(value):
        return [
            _name(type(value)),
            {f.name: inner(getattr(value, f.name)) for f in dataclasses.fields(value)},
        ]
    return [_name(type(value)), inner(getattr(value, "__dict__", {}))]


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _code(code: CodeType) -> str:
    constants = [_code(c) if isinstance(c, CodeType) else describe(c) for c in code.co_consts]
    return hashlib.sha256(repr((code.co_code, code.co_names, constants)).encode()).hexdigest()
