"""Are the groups of a model what pruning takes them for? Asked once of every model, on a few random
tokens.

Groups are found by the names and shapes of layers, and a shape can mislead: heads that are
    subtracted from one another, a norm
for every head, sizes that a forward takes from elsewhere. So one unit of every group is taken out
in two ways, by masking what it puts out and by slicing its weights, and both must give the same
logits.
"""

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.groups import Group, linear, not_plain, sync_sizes
from hipp_ext.modes import evaluating

TOKENS = 4
TOLERANCE = 4e-4  # of the largest logit: float32 sums in another order
ROUNDINGS = 8  # the same in half precision, in units of its precision

_verified: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def verify_groups(model: nn.Module, groups: Sequence[Group]) -> None:
    """Raise UnsupportedModelError if removing a unit of every group gives other logits than masking
    it.

    Cost: three forward passes over four tokens, the first time that a model is seen; no weight is
        copied or changed. Groups of
    the vision tower are left out, and so are models that could not be pruned anyway (quantised,
    adapted, offloaded, with shared weights).
    """
    several = [g for g in groups if g.tower == "language" and g.width > 1]
    if model in _verified or not several or not _sliceable(model, several):
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
        _verified.add(model)
        return
    if not torch.isfinite(dense).all():
        return  # for those to say who measure activations
    masked = _masked(model, several)
    try:
        sliced = _sliced(model, several)
    except Exception as error:
        raise UnsupportedModelError(
            f"{_refusal(model)} it does not run: {type(error).__name__}: {error}"
        ) from error
    allowed = max(TOLERANCE, ROUNDINGS * torch.finfo(dense.dtype).eps) * float(dense.abs().max())
    difference = float((masked - sliced).abs().max())
    if not difference <= allowed:
        raise UnsupportedModelError(
            f"{_refusal(model)} its logits differ by {difference:.3g} from those with the unit "
            "masked (the logits go up to "
            f"{float(dense.abs().max()):.3g})."
        )
    _verified.add(model)


def _refusal(model: nn.Module) -> str:
    return (
        f"The layers of {type(model).__name__} look like those of a model that can be pruned, and "
        "are not: with a unit of "
        "every group sliced out,"
    )


def _sliceable(model: nn.Module, groups: Sequence[Group]) -> bool:
    layers = [model.get_submodule(name) for g in groups for name in (*g.producers, g.consumer)]
    weights = {id(getattr(layer, "weight", None)) for layer in layers}
    shared = len(weights) < len(layers)
    return (
        not shared
        and not any(map(not_plain, layers))
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
    """The logits with the first unit of every group masked."""

    def mask(columns: int) -> Any:
        return lambda _, args: (nn.functional.pad(args[0][..., columns:], (columns, 0)), *args[1:])

    handles = [linear(model, g.consumer).register_forward_pre_hook(mask(g.columns)) for g in groups]
    try:
        return _logits(model)
    finally:
        for handle in handles:
            handle.remove()


def _sliced(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """The logits with the first unit of every group sliced out; parameters are views meanwhile."""
    whole: list[tuple[Tensor, Tensor]] = []
    try:
        for g in groups:
            for part in g.owns:
                parameter = model.get_parameter(part.parameter)
                whole.append((parameter, parameter.data))
                length = parameter.shape[part.dim] - part.size
                parameter.data = parameter.data.narrow(part.dim, part.size, length)
            sync_sizes(model, g, g.width - 1)
        return _logits(model)
    finally:
        for parameter, data in whole:
            parameter.data = data
        for g in groups:
            sync_sizes(model, g, g.width)
