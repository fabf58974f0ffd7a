"""What can be scored and sliced at all: plain floating-point weights, in memory, of one module."""

from collections import Counter
from collections.abc import Iterable

from torch import nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.groups.group import Group
from hipp_ext.kinds.slices import tensor_in
from hipp_ext.projections import is_plain_projection


def check_plain(model: nn.Module, groups: Iterable[Group]) -> None:
    """Raise UnsupportedModelError where a layer of `groups` is no plain floating-point linear
    layer.

    Layers that are quantised, adapted or parametrised are not.
    """
    for group in groups:
        for name in group.layers:
            if reason := not_plain(module := model.get_submodule(name), group.is_linear):
                raise UnsupportedModelError(
                    f"{name} is a {type(module).__name__} {reason}. Score, plan and prune the "
                    "floating-point model, before it is quantised or given adapters."
                )


def check_loaded(model: nn.Module, name: str = "") -> None:
    """Raise UnsupportedModelError where weights of `model`, or of its module `name`, are not in
    memory.
    """
    for parameter, weight in model.get_submodule(name).named_parameters(prefix=name):
        if weight.is_meta:
            raise UnsupportedModelError(
                f"{parameter} is not in memory (offloaded, or on the meta device). Load the model "
                'whole; several GPUs may share it (device_map="auto").'
            )


def check_sliceable(model: nn.Module, groups: Iterable[Group]) -> None:
    """Raise UnsupportedModelError where a layer of `groups`, which lose units, cannot be sliced.

    Such a layer is quantised, adapted, parametrised, offloaded, or shares its weight.
    """
    shared = _shared_parameters(model)
    for group in groups:
        for name in group.layers:
            module = model.get_submodule(name)
            if reason := not_plain(module, group.is_linear):
                raise UnsupportedModelError(
                    f"{name} is a {type(module).__name__} {reason}; only plain floating-point "
                    "linear layers can be sliced. Prune before you quantise or add adapters. "
                    "Nothing was changed."
                )
            check_loaded(model, name)
        for slices in group.cuts:
            name, _, attribute = slices[0].parameter.rpartition(".")
            if id(tensor_in(model, slices[0].parameter)) in shared:
                raise UnsupportedModelError(
                    f"{name} shares its {attribute} with another module and cannot be sliced alone."
                )


def not_plain(module: nn.Module, required: bool = True) -> str:
    """Why the entries of a module's parameters are not the numbers it computes with; empty if they
    are.

    Args:
        module: the module.
        required: whether it has to be a linear layer; otherwise it may be any.
    """
    if hasattr(module, "quantization_scheme"):  # its scales would stay behind
        return "that is quantised"
    weights = [p for p in module._parameters.values() if p is not None]
    plain = all(type(w) is nn.Parameter and w.is_floating_point() for w in weights)
    if plain and (not required or (weights and is_plain_projection(module))):
        return ""
    weight = getattr(module, "weight", weights[0] if weights else None)
    return f"with a {type(weight).__name__} weight of {getattr(weight, 'dtype', 'no dtype')}"


def _shared_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that more than one module holds."""
    held = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {parameter for parameter, modules in held.items() if modules > 1}
