"""Pruning a pruned model: two plans, one after the other, as one plan of the dense model."""

from dataclasses import replace
from typing import Any

from torch import nn

from hipp_ext.errors import PlanError
from hipp_ext.groups import tower_layers
from hipp_ext.plan import COMMANDS, PlanGroup, PruningPlan
from hipp_ext.surgery.drop import layer_numbers
from hipp_ext.surgery.masks import PLAN_ATTRIBUTE


def compose(first: PruningPlan, second: PruningPlan, layers: int) -> PruningPlan:
    """The plan of the dense model that keeps what is left after both plans.

    `prune(prune(m, a), b)` and `prune(m, compose(a, b, layers))` are equal to the bit. The units
    of the result are numbered as in the dense model; preference, scorer and notes are those of
    `second`, and the commands those of both.

    Args:
        first: plan of the dense model.
        second: plan of the model that `first` has pruned.
        layers: number of language layers that this model has.

    Raises:
        PlanError: `second` is no plan of a model that `first` has pruned, or it removes units of
            another kind (KV groups after query heads, experts after channels).
    """
    numbers = layer_numbers(first, layers)
    after: dict[Any, PlanGroup] = {(g.tower, g.layer, g.place): g for g in second.groups}
    groups = []
    for entry in first.groups:
        number = numbers.get(entry.layer) if entry.tower == "language" else entry.layer
        own = after.pop((entry.tower, number, entry.place), None) if entry.keep else None
        if own is not None:
            entry = replace(entry, kept=_kept(entry, own))
        elif entry.keep and entry.tower in second.towers:
            raise PlanError(
                f"{entry.name}: the first plan leaves {entry.keep} units, and the second one has "
                "no group for them: it is a plan of another model."
            )
        groups.append(entry)
    if unknown := [g.name for g in after.values() if g.tower in first.towers]:
        raise PlanError(
            f"The second plan has groups of which the first one leaves nothing: {unknown[:4]}. It "
            "is a plan of another model."
        )
    total = second.replace(
        groups=(*groups, *after.values()), left_whole=first.left_whole or second.left_whole
    )
    if first.commands:
        rest = {name: note for name, note in second.notes.items() if name != COMMANDS}
        total = total.replace(notes=rest).after(*first.commands, *second.commands)
    return total


def _kept(first: PlanGroup, second: PlanGroup) -> tuple[int, ...]:
    """The units that both plans keep, by their numbers in the dense model."""
    left, pruned = (
        (kind, f"{width} units of {size} parameters in {sections} sections")
        for kind, width, size, sections in (
            (first.kind, first.keep, first.unit_parameters, first.sections),
            (second.kind, second.width, second.unit_parameters, second.sections),
        )
    )
    if left == pruned:
        return tuple(first.kept[unit] for unit in second.kept)
    # Query heads that are left alone with their keys are KV groups from then on.
    if first.kind != second.kind and second.keep in (0, second.width):
        return first.kept if second.keep else ()
    raise PlanError(
        f"{first.name}: the first plan leaves {left[1]}, and the second one prunes {second.name}, "
        f"{pruned[1]}: it is a plan of another model, or of other units."
    )


def plan_in_total(model: nn.Module, plan: PruningPlan) -> PruningPlan:
    """The plan of the dense model after `plan` has pruned `model`, which may be pruned already.

    It is `plan` where the model carries no plan, or one that cannot be composed with it: its units
    are others, or it only set them to zero.
    """
    before: Any = getattr(model, PLAN_ATTRIBUTE, None)
    if before is None:
        return plan
    try:
        return compose(before, plan, len(tower_layers(model, "language")))
    except PlanError:
        return plan
