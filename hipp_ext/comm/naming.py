"""The names of the gradients that are compressed.

DDP's buckets hold parameters without names. A model, a mapping or a list names them beforehand;
otherwise the DistributedDataParallel whose parameters the buckets hold is looked up at the end of
the first step.
"""

import gc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hipp_ext.errors import CompressionError

Parameters = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | Sequence[Tensor]
_WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DDP and torch.compile


def name_parameters(parameters: Parameters) -> dict[str, Tensor]:
    """Name -> trained parameter, without those that DDP ignores; a list gets numbers as names.

    Raises:
        CompressionError: there is nothing to train, names are not unique, or a parameter is not
            made of real numbers.
    """
    pairs: list[Any]
    if isinstance(parameters, nn.Module):
        pairs = reduced_parameters(parameters)
    elif isinstance(parameters, Mapping):
        pairs = list(parameters.items())
    elif isinstance(parameters, Iterable) and not isinstance(parameters, Tensor | str | bytes):
        pairs = [p if isinstance(p, tuple) else (str(i), p) for i, p in enumerate(parameters)]
    else:
        raise CompressionError(
            "A model, named parameters, a list of tensors or a process group is needed, not "
            f"{parameters!r}."
        )
    for pair in pairs:
        if not (len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)):
            raise CompressionError(
                f"Parameters are tensors, or pairs of a name and a tensor, not {pair!r}."
            )
    named = {_unwrapped(name): p for name, p in pairs}
    if not named or len(named) < len(pairs):
        raise CompressionError(
            f"{len(pairs)} parameters with {len(named)} different names were given; at least one "
            "is needed."
        )
    for name, p in named.items():
        if not p.is_floating_point():
            raise CompressionError(
                f"{name} is {p.dtype}: only real floating-point gradients can be compressed."
            )
    return named


def reduced_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, parameter) of what DDP passes to its hooks: trained, and not ignored by DDP."""
    if isinstance(model, DistributedDataParallel):
        model, ignored = model.module, model.parameters_to_ignore
    else:
        ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
        if not ignored and any(hasattr(p, "_ddp_ignored") for p in model.parameters()):
            # Set on another module: the list of the module that DDP wraps counts, if there is one.
            mine = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
            for ddp in _wrapped_models():
                if mine.keys() <= {id(p) for p in ddp.module.parameters()}:
                    return [(mine[id(p)], p) for _, p in reduced_parameters(ddp) if id(p) in mine]
    found: dict[int, tuple[str, Tensor]] = {}
    for module_name, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            # DDP compares these names: a parameter of the outermost module is ".name" to it.
            if p.requires_grad and f"{module_name}.{name}" not in ignored:
                found.setdefault(id(p), (f"{module_name}.{name}".removeprefix("."), p))
    return list(found.values())


def name_reduced(parameters: Sequence[Tensor], state: Any) -> dict[str, Tensor]:
    """Name -> parameter of all that DDP handed out in a step, in the order of the model.

    Buckets name neither their parameters nor their DDP, so all objects are searched for it, once.

    Raises:
        CompressionError: no DistributedDataParallel has exactly these parameters.
    """
    asked = {id(p) for p in parameters}
    found = []
    for ddp in _wrapped_models():
        pairs = reduced_parameters(ddp)
        if {id(p) for _, p in pairs} == asked:
            # A model may have been wrapped again while its old wrapper is not yet collected.
            used = any(state is registered for _, registered in getattr(ddp, "_comm_hooks", ()))
            found.append((not used, len(found), pairs))
    if not found:
        raise CompressionError(
            f"No DistributedDataParallel reduces exactly these {len(asked)} parameters, so their "
            "names are unknown. Make one state per DDP, or name them: LQSGDState(ddp, ...)."
        )
    return name_parameters(dict(min(found)[2]))


def rename_as(
    shapes: Mapping[str, Sequence[int]], named: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`named` under the names that a state had before it was copied or pickled.

    A prefix that all names have in common makes no difference: the model may have been a part of
    another one, or may be now.

    Raises:
        CompressionError: names, order or shapes differ.
    """
    before, now = list(shapes), list(named)
    for longer, shorter in ((before, now), (now, before)):
        prefix = longer[0].removesuffix(shorter[0])
        if longer == [prefix + name for name in shorter]:
            renamed = dict(zip(before, named.values(), strict=True))
            if all(tuple(p.shape) == tuple(shapes[name]) for name, p in renamed.items()):
                return renamed
    shapes_now = {(name, tuple(p.shape)) for name, p in named.items()}
    wrong = sorted(shapes_now ^ {(name, tuple(shape)) for name, shape in shapes.items()})[:4]
    raise CompressionError(
        "This state was made for other parameters than these; they differ in "
        f"{wrong or 'their order'}."
    )


def _wrapped_models() -> list[DistributedDataParallel]:
    # type(), because isinstance would ask proxies. A failed constructor leaves no reducer.
    return [
        o
        for o in gc.get_objects()
        if issubclass(type(o), DistributedDataParallel) and hasattr(o, "reducer")
    ]


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name
