"""Are the groups of a model what pruning takes them for? Asked once of every model, on a few random
tokens.

Groups are found by the names and shapes of layers, and a shape can mislead: heads that are
subtracted from one another, a norm for every head, sizes that a forward takes from elsewhere. So
one unit of every group (of every section of it) is taken out in two ways, by masking what it puts
out and by slicing its weights, and both must give the same logits, or features of a random picture
where units see pictures.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.groups import Group, Tower, block_of, check_loaded, check_sliceable, gated, sync_sizes
from hipp_ext.kinds.slices import Slice, change_units, tensor_in, without_first
from hipp_ext.modes import evaluating
from hipp_ext.projections import sync_features
from hipp_ext.random_picture import picture_features, random_picture

TOKENS = 4
TOLERANCE = 4e-4  # of the largest logit: float32 sums in another order
ROUNDINGS = 8  # the same in half precision, in units of its precision

_switched_off: ContextVar[bool] = ContextVar("verification is switched off", default=False)
# Model -> the towers and kinds of its groups that were verified.
_verified: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()
Outputs = Callable[[], list[Tensor]]


@contextlib.contextmanager
def without_verification() -> Iterator[None]:
    """Inside the block `verify_groups` does nothing, for models that are known and large."""
    token = _switched_off.set(True)
    try:
        yield
    finally:
        _switched_off.reset(token)


def verify_groups(model: nn.Module, groups: Sequence[Group]) -> None:
    """Raise UnsupportedModelError if removing a unit of every group gives other outputs than
    masking it.

    Cost: three forward passes over four tokens, the first time that a model is seen with groups of
    these kinds; of groups that see pictures, three passes of a picture through vision tower and
    projector. No weight is changed, and none is copied but those of the query heads of the block
    that is running. Models that could not be pruned anyway (quantised, adapted, offloaded, with
    shared weights) are left out. Everything that scores, plans, masks, slices or prunes calls it;
    `without_verification` switches it off.
    """
    several = [g for g in groups if g.width - g.sections >= g.least]
    reading = [g for g in several if g.tower == "language"]
    seeing = [g for g in several if g.tower != "language"]
    towers: tuple[Tower, ...] = tuple(dict.fromkeys(g.tower for g in seeing))
    _verify(model, reading, "run on tokens alone", lambda: lambda: [_logits(model)])

    def looks() -> Outputs:
        picture = random_picture(model)
        return lambda: picture_features(model, picture, towers)

    _verify(model, seeing, "take a random picture", looks)


def _verify(
    model: nn.Module, groups: Sequence[Group], what: str, runs: Callable[[], Outputs]
) -> None:
    """Compare what `runs()` returns with units masked to the same with units sliced out."""
    kinds = {(g.tower, g.kind) for g in groups}
    known = _switched_off.get() or kinds <= _verified.get(model, set())
    if known or not _is_sliceable(model, groups):
        return
    try:
        outputs = runs()
        dense = outputs()
    except Exception as error:  # whatever the forward of a model raises that wants more
        warnings.warn(
            f"{type(model).__name__} does not {what} ({type(error).__name__}: {error}): whether "
            "its layers are what pruning takes them for was not checked.",
            stacklevel=4,
        )
        _verified.setdefault(model, set()).update(kinds)
        return
    if not all(bool(torch.isfinite(values).all()) for values in dense):
        return  # for those to say who measure activations
    if fault := _fault(model, groups, dense, outputs):
        first = next((g for g in groups if _fault(model, [g], dense, outputs)), groups[0])
        raise UnsupportedModelError(
            f"The layers of {type(model).__name__} look like those of a model that can be pruned, "
            f"and are not: with a unit of every group sliced out, {fault}. The first block of that "
            f"sort is {first.block} ({type(block_of(model, first)).__name__})."
        )
    _verified.setdefault(model, set()).update(kinds)


def _fault(
    model: nn.Module, groups: Sequence[Group], dense: Sequence[Tensor], outputs: Outputs
) -> str:
    """What goes wrong when units of `groups` are sliced out instead of masked; empty: nothing."""
    masked = _masked(model, groups, outputs)
    try:
        sliced = _sliced(model, groups, outputs)
    except Exception as error:  # whatever the forward of a model raises
        return f"it does not run: {type(error).__name__}: {str(error).rstrip('. ')}"
    name = "logits" if groups[0].tower == "language" else "features of a picture"
    for whole, one, other in zip(dense, masked, sliced, strict=True):
        largest, difference = float(whole.abs().max()), float((one - other).abs().max())
        if not difference <= max(TOLERANCE, ROUNDINGS * torch.finfo(whole.dtype).eps) * largest:
            return (
                f"its {name} differ by {difference:.3g} from those with the unit masked (the "
                f"{name} go up to {largest:.3g})"
            )
    return ""


def _is_sliceable(model: nn.Module, groups: Sequence[Group]) -> bool:
    with contextlib.suppress(UnsupportedModelError):
        check_sliceable(model, groups)
        check_loaded(model)
        return True
    return False


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    special = {
        value
        for config in (model.config, model.config.get_text_config())  # type: ignore[union-attr]
        for name, value in vars(config).items()
        if "token" in name and isinstance(value, int)
    }
    plain = [i for i in range(embeddings.weight.shape[0]) if i not in special]
    chosen = torch.randint(len(plain), (1, TOKENS), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor(plain)[chosen].to(embeddings.weight.device)
    with evaluating(model):
        return model(input_ids=ids, use_cache=False)[0]


def _masked(model: nn.Module, groups: Sequence[Group], outputs: Outputs) -> list[Tensor]:
    """The outputs with the first unit of every group, and section, masked."""
    masks = {}
    for g in groups:
        masks[g] = torch.ones(g.sections, g.width // g.sections, dtype=torch.bool)
        masks[g][:, 0] = False
        masks[g] = masks[g].flatten()
    with gated(model, masks):
        return outputs()


def _sliced(model: nn.Module, groups: Sequence[Group], outputs: Outputs) -> list[Tensor]:
    """The outputs with the first unit of every group, and section, sliced out."""
    with contextlib.ExitStack() as stack:
        for g in groups:
            stack.callback(sync_sizes, model, g, g.width)
            for slices in g.cuts:
                stack.enter_context(_cut_while_running(model, g, slices))
            sync_sizes(model, g, g.width - g.sections)
        return outputs()


@contextlib.contextmanager
def _cut_while_running(model: nn.Module, group: Group, slices: Sequence[Slice]) -> Iterator[None]:
    """Inside the `with` block a parameter is without the first units while its block runs.

    It is a view where the units lie in one piece, else a copy.
    """
    parameter, block = tensor_in(model, slices[0].parameter), block_of(model, group)
    whole, layer = parameter.data, model.get_submodule(slices[0].layer)

    def show(values: Tensor) -> None:
        parameter.data = values
        sync_features(layer)

    def cut(*_: Any) -> None:
        show(change_units(whole, slices, group.width, without_first(group.sections)))

    def restore(*_: Any) -> None:
        show(whole)

    with block.register_forward_pre_hook(cut), block.register_forward_hook(restore):
        try:
            yield
        finally:
            show(whole)
