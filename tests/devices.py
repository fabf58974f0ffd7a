"""Several devices in pretence, for machines that have one; and what tensors take up.

A tensor on a pretended device is a meta tensor, and its numbers lie in a storage of the CPU. Every
operation runs there, after a look at where its operands are said to be. As on GPUs they have to be
together, but for scalars, and for indices on the CPU.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hipp_ext.groups import tower_layers

FIRST, SECOND = (
    "xla:0",
    "xla:1",
)  # a kind of device that torch knows by name and does not try to start
CPU = torch.device("cpu")
ANYWHERE = torch.device("meta")  # made within an operation of torch, next to what it works on
INDEXING = {
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
    "aten::_unsafe_index",
}


@contextlib.contextmanager
def pretended_devices() -> Iterator[None]:
    """Inside the block `tensor.to(FIRST)` and `tensor.to(SECOND)` work, and mixing them raises
    RuntimeError.
    """
    memory = _Memory()
    with _Operations(memory), _Attributes(memory):
        yield


def spread(model: nn.Module, late: set[nn.Module]) -> nn.Module:
    """`model` over both devices by accelerate, as `from_pretrained(device_map=...)` does it: the
    modules `late` on SECOND.
    """
    from accelerate import dispatch_model

    places: dict[str, str] = {}

    def place(name: str, module: nn.Module) -> None:
        if module in late:
            places[name] = SECOND
        elif not late.isdisjoint(module.modules()):
            for own, parameter in module.named_parameters(recurse=False):
                setattr(module, own, nn.Parameter(parameter.detach().to(FIRST)))
                places[f"{name}.{own}"] = FIRST
            for child_name, child in module.named_children():
                place(f"{name}.{child_name}" if name else child_name, child)
        else:
            places[name] = FIRST

    place("", model)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of single parameters, which from_pretrained has placed by then
        return dispatch_model(model, places, skip_keys=model._skip_keys_device_placement)


def later_half(model: nn.Module) -> set[nn.Module]:
    """All layers of the language tower but the first one, and the head."""
    return {*tower_layers(model, "language")[1:], model.get_output_embeddings()}


class LiveBytes(TorchDispatchMode):
    """Inside the block, counts the memory of what operations make.

    Attributes:
        now: bytes that are still held.
        peak: the most that was held at once.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._held: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in _tensors(out)]:
            if storage._cdata not in given | self._held:
                self._held.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _release(self, address: int, size: int) -> None:
        self._held.discard(address)
        self.now -= size


class _Memory:
    """Which storage of the CPU stands behind a meta tensor's, and where that is said to lie."""

    def __init__(self):
        self._behind: dict[int, tuple[torch.UntypedStorage, torch.device]] = {}
        self._stand_ins: dict[int, torch.UntypedStorage] = {}

    def where(self, tensor: Tensor) -> torch.device:
        return self._behind[tensor.untyped_storage()._cdata][1] if _is_meta(tensor) else CPU

    def numbers(self, tensor: Tensor) -> Tensor:
        """The tensor's numbers, on the CPU."""
        if not _is_meta(tensor):
            return tensor
        storage, _ = self._behind[tensor.untyped_storage()._cdata]
        empty = torch.empty(0, dtype=tensor.dtype)
        return empty.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())

    def place(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A tensor of `device` with the numbers of one on the CPU; views stay views."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._stand_ins:
            stand_in = torch.UntypedStorage(storage.nbytes(), device="meta")
            self._stand_ins[storage._cdata], self._behind[stand_in._cdata] = (
                stand_in,
                (storage, device),
            )
        empty = torch.empty(0, dtype=tensor.dtype, device="meta")
        return empty.set_(
            self._stand_ins[storage._cdata], tensor.storage_offset(), tensor.size(), tensor.stride()
        )


class _Operations(TorchDispatchMode):
    def __init__(self, memory: _Memory):
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        memory, name, kwargs = self.memory, func._schema.name, dict(kwargs or {})
        device = self._meet(name, args, kwargs)
        if kwargs.get("device") is not None:
            device, kwargs["device"] = torch.device(kwargs["device"]), CPU
        args_there, kwargs_there = _map_tensors(memory.numbers, (args, kwargs))
        out = func(*args_there, **kwargs_there)
        if name.endswith("_") and isinstance(args[0], Tensor):
            return args[0]
        return out if device == CPU else _map_tensors(lambda t: memory.place(t, device), out)

    def _meet(self, name: str, args: Any, kwargs: Any) -> torch.device:
        """Where the operation happens."""
        tensors = _tensors((args, kwargs))
        places = [self.memory.where(t) for t in tensors]
        if name in ("aten::_to_copy", "aten::copy_"):
            return places[0]
        if name in INDEXING:
            indices = len(_tensors(args[1]))
            tensors = [
                tensors[0],
                *(t for t in tensors[1:] if self.memory.where(t) != CPU),
                *tensors[1 + indices :],
            ]
        meeting = {
            self.memory.where(t) for t in tensors if self.memory.where(t) != CPU or t.dim()
        } - {ANYWHERE}
        # Backward, a copy between devices is undone by autograd itself, which here takes all of
        # them for one.
        if len(meeting) > 1 and torch._C._current_graph_task_id() == -1:
            raise RuntimeError(f"{name} of tensors on {[str(p) for p in places]}")
        if name in INDEXING:
            return places[0]
        known = [p for p in places if p not in (CPU, ANYWHERE)]
        return known[-1] if known else ANYWHERE if ANYWHERE in places else CPU


class _Attributes(TorchFunctionMode):
    """What Python asks of a tensor itself, without an operation."""

    def __init__(self, memory: _Memory):
        super().__init__()
        self.memory = memory

    def __torch_function__(self, func, types, args=(), kwargs=None):
        memory, kwargs = self.memory, dict(kwargs or {})
        if func == Tensor.is_meta.__get__:
            return False
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if not (args and isinstance(args[0], Tensor) and _is_meta(args[0])):
            return func(*args, **kwargs)
        if func == Tensor.device.__get__:
            return memory.where(args[0])
        if func is Tensor.tolist:
            return memory.numbers(args[0]).tolist()
        if func is Tensor.to and not kwargs.get("copy"):
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
            if device in (None, memory.where(args[0])) and dtype in (None, args[0].dtype):
                return args[0]
        if func is Tensor.__setitem__:
            there, index, value = _map_tensors(memory.numbers, args)
            there[index] = value
            return None
        return func(*args, **kwargs)


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map_tensors(found.append, tree)
    return found


def _map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """`tree` with every tensor in its tuples, lists and dicts replaced; torch's own way takes most
    of the time of a test.
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, (tuple, list)):
        mapped = [_map_tensors(function, leaf) for leaf in tree]
        return type(tree)(*mapped) if hasattr(tree, "_fields") else type(tree)(mapped)
    if isinstance(tree, dict):
        return {key: _map_tensors(function, leaf) for key, leaf in tree.items()}
    return tree


def _is_meta(tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return tensor.is_meta
