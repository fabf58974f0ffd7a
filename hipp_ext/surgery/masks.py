"""A plan as masks: the model computes as if pruned, and keeps all its weights."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from hipp_ext.errors import PlanError, UnsupportedModelError
from hipp_ext.groups import Group, check_sliceable, find_groups, gated
from hipp_ext.kinds import KINDS
from hipp_ext.kinds.slices import tensor_in
from hipp_ext.plan import PlanGroup, PruningPlan
from hipp_ext.projections import projection
from hipp_ext.units import keep_masks, unit_entries
from hipp_ext.verification import verify_groups

Model = TypeVar("Model", bound=nn.Module)
PLAN_ATTRIBUTE = "hipp_plan"  # where a pruned model carries its plan


@contextlib.contextmanager
def masked(model: Model, plan: PruningPlan | str | Path) -> Iterator[Model]:
    """Inside the block `model` computes as if pruned by `plan`; it is as before afterwards.

    The inputs of every consumer (o_proj, down_proj) are multiplied by the keep mask; a block that
    keeps no unit adds nothing. Same outputs as `prune(model, plan)` up to rounding, at the dense
    model's cost.

    Raises:
        PlanError: the plan does not fit the model.
    """
    plan = loaded_plan(plan)
    masks = zip(match(model, plan), keep_masks(plan).values(), strict=True)
    with gated(model, dict(masks)):
        yield model


def zero_units(model: nn.Module, plan: PruningPlan | str | Path) -> None:
    """Set the weights and biases of the units that `plan` does not keep to zero; all shapes stay.

    Producers and consumers both: a removed unit is zero on its way in, so nothing that is
        calibrated
    afterwards (GPTQ's error compensation, for one) has a reason to fill its columns again. Same
    outputs as `masked(model, plan)`.

    Raises:
        PlanError, UnsupportedModelError: as `prune`; nothing was changed.
    """
    plan = loaded_plan(plan)
    for name, index in removed_entries(model, plan).items():
        model.get_parameter(name).data[index] = 0
    setattr(model, PLAN_ATTRIBUTE, plan)


def removed_entries(model: nn.Module, plan: PruningPlan) -> dict[str, Any]:
    """Parameter name -> index of its entries that belong to units `plan` does not keep.

    Raises:
        PlanError, UnsupportedModelError: as `prune`; also where experts are to go, since a router
            sends tokens to an expert of zeros too.
    """
    groups = match(model, plan)
    pairs = list(zip(groups, plan.groups, strict=True))
    check_sliceable(model, [g for g, e in pairs if e.keep < e.width])
    for group, entry in pairs:
        if 0 < entry.keep < entry.width and not KINDS[group.kind].neutral_zeros:
            raise UnsupportedModelError(
                f"{group.name} cannot be set to zero: the router would go on sending tokens there. "
                "Prune the model, or plan with expert_unit='channel'."
            )
    entries: dict[str, Any] = {}
    for group, mask in zip(groups, keep_masks(plan).values(), strict=True):
        removed = (~mask).nonzero()[:, 0]
        if not len(removed):
            continue
        for parts in group.cuts:
            units = removed.to(tensor_in(model, parts[0].parameter).device)
            index = torch.cat([part.start + unit_entries(units, part.size) for part in parts])
            entries[parts[0].parameter] = (*[slice(None)] * parts[0].dim, index)
        if not mask.any():
            entries |= _whole_output(model, group)
    return entries


def _whole_output(model: nn.Module, group: Group) -> dict[str, Any]:
    """What else has to be zero for a block of `group` without any unit to add nothing."""
    if group.is_linear:
        biased = projection(model, group.consumer).bias is not None
        return {f"{group.consumer}.bias": slice(None)} if biased else {}
    block = model.get_submodule(group.block)
    return {f"{group.block}.{name}": slice(None) for name, _ in block.named_parameters()}


def loaded_plan(plan: PruningPlan | str | Path) -> PruningPlan:
    """The plan, read from its file where a path is given."""
    if isinstance(plan, PruningPlan):
        return plan
    if isinstance(plan, str | Path):
        return PruningPlan.load(plan)
    raise PlanError(
        f"A PruningPlan, or the path of a plan file, is needed, not a {type(plan).__name__}."
    )


def match(model: nn.Module, plan: PruningPlan) -> tuple[Group, ...]:
    """The model's groups in the order of the plan's entries.

    Raises:
        PlanError: a group of the plan is not in the model or has another width or unit size, or a
            group of a tower that the plan covers is missing from the plan.
        UnsupportedModelError: see `verify_groups`.
    """
    found = groups_of(model, plan)
    missing = sorted(set(found) - set(plan.keep_counts))
    unknown = sorted(set(plan.keep_counts) - set(found))
    problems = [f"only in the model: {missing[:4]}"] * bool(missing)
    problems += [f"only in the plan: {unknown[:4]}"] * bool(unknown)
    wrong = [
        f"{e.name}: plan {_size(e)} parameters, model {_size(found[e.name])}"
        for e in plan.groups
        if e.name in found and _size(e) != _size(found[e.name])
    ]
    few = [
        f"{e.name} keeps {e.keep} of {e.width} {KINDS[e.kind].unit}, and needs "
        f"{found[e.name].least} or none"
        for e in plan.groups
        if e.name in found and 0 < e.keep < found[e.name].least
    ]
    if few and not problems and not wrong:
        raise PlanError(f"The plan leaves too little; nothing was changed. {'; '.join(few[:4])}")
    if problems or wrong:
        raise PlanError(
            f"The plan was made for another model than this {type(model).__name__}; nothing was "
            "changed. " + "; ".join(problems + wrong[:4])
        )
    groups = tuple(found[e.name] for e in plan.groups)
    needed = [
        g.name for g, e in zip(groups, plan.groups, strict=True) if not (e.keep or g.droppable)
    ]
    if needed:
        raise PlanError(
            f"The plan drops {', '.join(needed[:4])}, without which {type(model).__name__} does "
            "not work, since later layers attend to its keys and values, or nothing else leads "
            "from the pictures to the language tower: one unit of each section must stay. Nothing "
            "was changed."
        )
    verify_groups(model, groups)
    return groups


def groups_of(model: nn.Module, plan: PruningPlan) -> dict[str, Group]:
    """Name -> group of the model, in the units of the plan.

    What a plan has no groups of was left whole when it was made: it says so. Where query heads are
    in a plan because layers share keys, others may be KV groups.
    """
    first: dict[str, Group] = {}
    for unit in dict.fromkeys((plan.attention_unit, "kv")):
        groups = find_groups(model, plan.towers, unit, plan.expert_unit, partial="report")
        found = {g.name: g for g in groups}
        if found.keys() == plan.keep_counts.keys():
            return found
        first = first or found
    return first


def _size(group: Group | PlanGroup) -> str:
    """What a plan's group and a model's group must agree in."""
    sections = f" in {group.sections} sections" if group.sections > 1 else ""
    return f"{group.width} units{sections} of {group.unit_parameters}"
