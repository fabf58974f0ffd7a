"""Which gradients are compressed, under which names, and whether all ranks agree on that.

DDP's buckets hold parameters without names. A model, a mapping or a list names them beforehand; where none was given, the
DistributedDataParallel whose parameters the buckets hold is looked up when the first step is complete.
"""

import gc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hipp_ext.comm.compressor import Options
from hipp_ext.errors import CompressionError

Parameters = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | Sequence[Tensor]
_WRAPPERS = ("module.", "_orig_mod.")  # what DDP and torch.compile put before a parameter's name
_SPELLINGS = {
    "matrix_approximation_rank": "rank",
    "min_compression_rate": "min_rate",
    "random_seed": "seed",
}  # PowerSGD's


def make_options(given: Mapping[str, Any]) -> Options:
    """Options from keywords, in our spelling or in that of torch's PowerSGDState.

    Raises:
        CompressionError: an option is unknown, out of range, or given in both spellings.
    """
    ours: dict[str, Any] = {}
    for name, value in given.items():
        if (own := _SPELLINGS.get(name, name)) in ours:
            other = next(n for n in given if n != name and _SPELLINGS.get(n, n) == own)
            raise CompressionError(
                f"{other}={given[other]!r} and {name}={value!r} are the same option: give one of them."
            )
        ours[own] = value
    try:
        return Options(**ours)
    except TypeError as error:
        known = ", ".join([*Options.__dataclass_fields__, *_SPELLINGS])
        raise CompressionError(f"LQSGDState takes the options {known}: {error}") from None


def name_parameters(parameters: Parameters) -> dict[str, Tensor]:
    """Name -> parameter that is trained, without those that DDP ignores; numbers as names for a list of tensors.

    Raises:
        CompressionError: there is nothing to train, names are not unique, or a parameter is not made of real numbers.
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
            f"A model, named parameters, a list of tensors or a process group is needed, not {parameters!r}."
        )
    if wrong := [
        p for p in pairs if not (len(p) == 2 and isinstance(p[0], str) and isinstance(p[1], Tensor))
    ]:
        raise CompressionError(
            f"Parameters are tensors, or pairs of a name and a tensor, not {wrong[0]!r}."
        )
    named = {_unwrapped(name): p for name, p in pairs}
    if not named or len(named) < len(pairs):
        raise CompressionError(
            f"{len(pairs)} parameters with {len(named)} different names were given; at least one is needed."
        )
    for name, p in named.items():
        if not p.is_floating_point():
            raise CompressionError(
                f"{name} is {p.dtype}: only real floating-point gradients can be compressed."
            )
    return named


def reduced_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, parameter) of what DDP hands to its hooks: what is trained, less what DDP was told to ignore."""
    if isinstance(model, DistributedDataParallel):
        model, ignored = model.module, model.parameters_to_ignore
    else:
        ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
        # Told so on another module than this one: what counts is the module that DDP wraps, if it does already.
        if not ignored and any(hasattr(p, "_ddp_ignored") for p in model.parameters()):
            mine = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
            around = [
                ddp
                for ddp in _wrapped_models()
                if mine.keys() <= {id(p) for p in ddp.module.parameters()}
            ]
            if around:
                return [(mine[id(p)], p) for _, p in reduced_parameters(around[0]) if id(p) in mine]
    found: dict[int, tuple[str, Tensor]] = {}
    for module_name, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            # DDP compares these very names: a parameter of the outermost module is ".name", and "name" does not ignore it.
            if p.requires_grad and f"{module_name}.{name}" not in ignored:
                found.setdefault(id(p), (f"{module_name}.{name}".removeprefix("."), p))
    return list(found.values())


def name_reduced(parameters: Sequence[Tensor], state: Any) -> dict[str, Tensor]:
    """Name -> parameter of all that DDP handed out in a step, in the order of the model.

    Buckets name neither their parameters nor the DDP they belong to, so it is looked for among all objects, once.

    Raises:
        CompressionError: no DistributedDataParallel has just these parameters.
    """
    wanted = {id(p) for p in parameters}
    found = []
    for ddp in _wrapped_models():
        pairs = reduced_parameters(ddp)
        if {id(p) for _, p in pairs} == wanted:
            # One model may have been wrapped anew while the old wrapper still waits to be collected.
            used = any(state is registered for _, registered in getattr(ddp, "_comm_hooks", ()))
            found.append((not used, len(found), pairs))
    if not found:
        raise CompressionError(
            f"No DistributedDataParallel was found that reduces just these {len(wanted)} parameters, so they have no names. "
            "Make one state per DDP; or name them: LQSGDState(ddp, ...)."
        )
    return name_parameters(dict(min(found)[2]))


def rename_as(
    shapes: Mapping[str, Sequence[int]], named: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`named` under the names that a state was made with before it was copied or pickled.

    The model may have stood inside another one then, or may now: a prefix that all names have in common is no difference.

    Raises:
        CompressionError: other names, another order or other shapes.
    """
    was, now = list(shapes), list(named)
    for longer, shorter in ((was, now), (now, was)):
        prefix = longer[0].removesuffix(shorter[0])
        if longer == [prefix + name for name in shorter]:
            renamed = dict(zip(was, named.values(), strict=True))
            if all(tuple(p.shape) == tuple(shapes[name]) for name, p in renamed.items()):
                return renamed
    shapes_now = {(name, tuple(p.shape)) for name, p in named.items()}
    wrong = sorted(shapes_now ^ {(name, tuple(shape)) for name, shape in shapes.items()})[:4]
    raise CompressionError(
        f"This state was made for other parameters than these; they differ in {wrong or 'their order'}."
    )


def agree(
    group: Any, named: Mapping[str, Tensor] | CompressionError, options: Mapping[str, Any]
) -> Options:
    """The options, once all ranks have told what they have, so that none waits for one that has given up.

    Args:
        group: of the ranks; each of them calls this.
        named: name -> parameter, or why this rank has none.
        options: as given by the user.

    Raises:
        CompressionError: on all ranks, where one has an error, or another layout or other options than the first.
    """
    try:
        problem = str(named) if isinstance(named, CompressionError) else None
        chosen = make_options(options)
    except CompressionError as error:
        chosen, problem = Options(), problem or str(error)
    shapes = (
        {}
        if isinstance(named, CompressionError)
        else {f"shape of {n}": list(p.shape) for n, p in named.items()}
    )
    everyone = tell_all(group, {"problem": problem, **chosen.plain(), **shapes})
    for rank, theirs in enumerate(everyone):
        if theirs["problem"] is not None:
            raise CompressionError(f"Rank {rank}: {theirs['problem']}")
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0] or list(theirs) != list(everyone[0]):
            key = next(
                (k for k in {**everyone[0], **theirs} if everyone[0].get(k) != theirs.get(k)),
                "the parameters' order",
            )
            raise CompressionError(
                f"The ranks do not compress alike: {key} is {everyone[0].get(key)} on rank 0, {theirs.get(key)} on rank {rank}."
            )
    return chosen


def tell_all(group: Any, mine: Any) -> list[Any]:
    """What each rank of `group` tells the others, in their order.

    Raises:
        CompressionError: a rank does not answer.
    """
    everyone: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(everyone, mine, group=group)
    except RuntimeError as error:
        raise CompressionError(
            f"The {len(everyone)} ranks could not agree; a worker may have died: {error}"
        ) from error
    return everyone


def _wrapped_models() -> list[DistributedDataParallel]:
    # type(), since isinstance would ask proxies; a constructor that failed leaves objects without a reducer.
    return [
        o
        for o in gc.get_objects()
        if issubclass(type(o), DistributedDataParallel) and hasattr(o, "reducer")
    ]


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name
