"""Blocks and layers that leave whole, because a plan keeps none of their units."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from hipp_ext.families import CACHE_LAYER, drop_layers, varies_by_itself
from hipp_ext.groups import Group, find_groups, tower_layers
from hipp_ext.kinds import KINDS
from hipp_ext.layer_parts import own_norms
from hipp_ext.plan import PruningPlan
from hipp_ext.surgery.layer_config import built_shapes


def skip_modules(model: nn.Module, groups: Iterable[Group]) -> dict[str, nn.Module]:
    """Module name -> what stands in its place when the blocks of `groups` are dropped.

    A block becomes a `Skip`, and the norms that serve it alone become identities.
    """
    modules: dict[str, nn.Module] = {}
    for group in groups:
        kind, block = KINDS[group.kind], model.get_submodule(group.block)
        layer, layer_name = tower_layers(model, group.tower)[group.layer], group.block
        while model.get_submodule(layer_name) is not layer:
            layer_name = layer_name.rpartition(".")[0]
        if block is layer:  # whose linear layers are the block
            modules |= {name: nn.Identity() for name in group.producers}
            modules[group.consumer] = kind.skip(model.get_submodule(group.consumer))
        else:
            modules[group.block] = kind.skip(block)
        for norm in own_norms(layer, group.place):
            modules[f"{layer_name}.{norm}"] = nn.Identity()
    return modules


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put `modules` in their places; returns what stood there."""
    before = {name: model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        owner, _, child = name.rpartition(".")
        setattr(model.get_submodule(owner), child, module)
    return before


def removable_layers(model: nn.Module, plan: PruningPlan) -> list[int]:
    """Numbers of the language layers of which `plan` keeps nothing, and which hold nothing else.

    Layers with other parts (a state-space mixer, gates) stay, with both blocks skipped, and so do
    those that the model adds image features after by their number. All of them stay where
    transformers would not build the layers that are left, because their numbers decide what they
    are.
    """
    kept = {e.layer for e in plan.groups if e.tower == "language" and e.keep}
    gone = {e.layer for e in plan.groups if e.tower == "language"} - kept
    if not gone or varies_by_itself(model.config.get_text_config()):  # type: ignore[union-attr]
        return []
    layers = tower_layers(model, "language")
    stay = {g.layer for g in find_groups(model, partial="report") if not g.removable}
    numbers = sorted(gone - stay)
    return numbers if _builds_without(model, layers, numbers) else []


def _builds_without(model: Any, layers: nn.ModuleList, numbers: Sequence[int]) -> bool:
    """Whether transformers builds the layers that are left when those of `numbers` are gone."""
    if not numbers:
        return True
    config = copy.deepcopy(model.config)
    drop_layers(config.get_text_config(), numbers)
    built = built_shapes(model, config)
    prefix = next(name for name, m in model.named_modules() if m is layers)
    kept = [layer for i, layer in enumerate(layers) if i not in set(numbers)]
    return all(f"{prefix}.{i}.{n}" in built for i, m in enumerate(kept) for n in m.state_dict())


def remove_layers(model: nn.Module, numbers: Sequence[int]) -> None:
    """Take layers out of the language tower, and renumber the others in modules and
    configuration.
    """
    if not numbers:
        return
    layers = tower_layers(model, "language")
    for number in sorted(numbers, reverse=True):
        del layers[number]
    for number, layer in enumerate(layers):
        for module in layer.modules():
            for name in CACHE_LAYER:
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, number)
    drop_layers(model.config.get_text_config(), numbers)  # type: ignore[union-attr]


def layer_numbers(plan: PruningPlan, layers: int) -> dict[int, int]:
    """Layer number of the dense language tower -> number in a pruned one that has `layers`
    layers. A layer of which the plan names no group is one of a hybrid, which keeps all layers.
    """
    numbers = sorted({e.layer for e in plan.groups if e.tower == "language"})
    if plan.left_whole or numbers != list(range(len(numbers))):
        return {n: n for n in numbers}
    kept = {e.layer for e in plan.groups if e.tower == "language" and e.keep}
    gone = [n for n in numbers if n not in kept]
    left = gone[: max(0, layers - len(kept))]  # those that could not be removed are the first ones
    return {old: new for new, old in enumerate(sorted(kept.union(left)))}
