"""Are the groups of a model what pruning takes them for? Asked once of every model, on a few random
tokens.

Groups are found by the names and shapes of layers, and a shape can mislead: heads that are
    subtracted from one another, a norm
for every head, sizes that a forward takes from elsewhere. So one unit of every group (of every
section of it) is taken out in two ways, by masking what it puts out and by slicing its weights, and
both must give the same logits.
"""

import contextlib
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.groups import Group, block_of, gated, not_plain, sync_sizes
from hipp_ext.kinds.slices import Slice, change_units, tensor_in, without_first
from hipp_ext.modes import evaluating

TOKENS = 4
TOLERANCE = 4e-4  # of the largest logit: float32 sums in another order
ROUNDINGS = 8  # the same in half precision, in units of its precision

# Model -> the kinds of its groups that were verified.
_verified: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def verify_groups(model: nn.Module, groups: Sequence[Group]) -> None:
    """Raise UnsupportedModelError if removing a unit of every group gives other logits than masking
    it.

    Cost: three forward passes over four tokens, the first time that a model is seen with groups of
    these kinds; no weight is changed, and none is copied but those of the query heads of the block
    that is running. Groups of the vision tower are left out, and so are models that could not be
    pruned anyway (quantised, adapted, offloaded, with shared weights).
    """
    several = [g for g in groups if g.tower == "language" and g.width - g.sections >= g.least]
    kinds = {g.kind for g in several}
    if kinds <= _verified.get(model, set()) or not _sliceable(model, several):
        return
    try:
        dense = _logits(model)
    except Exception as error:  # whatever the forward of a model raises that wants more than tokens
        warnings.warn(
            f"{type(model).__name__} does not run on tokens alone ({type(error).__name__}: "
            f"{error}): whether its layers are "
            "what pruning takes them for was not checked.",
            stacklevel=2,
        )
        _verified.setdefault(model, set()).update(kinds)
        return
    if not torch.isfinite(dense).all():
        return  # for those to say who measure activations
    if fault := _fault(model, several, dense):
        first = next((g for g in several if _fault(model, [g], dense)), several[0])
        raise UnsupportedModelError(
            f"The layers of {type(model).__name__} look like those of a model that can be pruned, "
            f"and are not: with a unit of every group sliced out, {fault}. The first block of that "
            f"sort is {first.block} ({type(block_of(model, first)).__name__})."
        )
    _verified.setdefault(model, set()).update(kinds)


def _fault(model: nn.Module, groups: Sequence[Group], dense: Tensor) -> str:
    """What goes wrong when units of `groups` are sliced out instead of masked; empty: nothing."""
    masked = _masked(model, groups)
    try:
        sliced = _sliced(model, groups)
    except Exception as error:  # whatever the forward of a model raises
        return f"it does not run: {type(error).__name__}: {str(error).rstrip('. ')}"
    largest, difference = float(dense.abs().max()), float((masked - sliced).abs().max())
    if difference <= max(TOLERANCE, ROUNDINGS * torch.finfo(dense.dtype).eps) * largest:
        return ""
    return (
        f"its logits differ by {difference:.3g} from those with the unit masked (the logits go up "
        f"to {largest:.3g})"
    )


def _sliceable(model: nn.Module, groups: Sequence[Group]) -> bool:
    parameters = [slices[0].parameter for g in groups for slices in g.cuts]
    shared = len({id(tensor_in(model, name)) for name in parameters}) < len(parameters)
    layers = [(model.get_submodule(name), g.is_linear) for g in groups for name in g.layers]
    return (
        not shared
        and not any(not_plain(layer, linear) for layer, linear in layers)
        and not any(p.is_meta for p in model.parameters())
    )


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


def _masked(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """The logits with the first unit of every group, and section, masked."""
    masks = {}
    for g in groups:
        masks[g] = torch.ones(g.sections, g.width // g.sections, dtype=torch.bool)
        masks[g][:, 0] = False
        masks[g] = masks[g].flatten()
    with gated(model, masks):
        return _logits(model)


def _sliced(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """The logits with the first unit of every group, and section, sliced out."""
    with contextlib.ExitStack() as stack:
        for g in groups:
            stack.callback(sync_sizes, model, g, g.width)
            for slices in g.cuts:
                stack.enter_context(_cut_while_running(model, g, slices))
            sync_sizes(model, g, g.width - g.sections)
        return _logits(model)


@contextlib.contextmanager
def _cut_while_running(model: nn.Module, group: Group, slices: Sequence[Slice]) -> Iterator[None]:
    """Inside the `with` block a parameter is without the first units while its block runs.

    It is a view where the units lie in one piece, else a copy.
    """
    parameter, block = tensor_in(model, slices[0].parameter), block_of(model, group)
    whole = parameter.data

    def cut(*_: Any) -> None:
        parameter.data = change_units(whole, slices, group.width, without_first(group.sections))

    def restore(*_: Any) -> None:
        parameter.data = whole

    with block.register_forward_pre_hook(cut), block.register_forward_hook(restore):
        try:
            yield
        finally:
            parameter.data = whole
