"""A plan and a dense model -> a smaller dense model."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hipp_ext.calibration import Batch, Calibration, CalibrationLike
from hipp_ext.groups import Group, check_sliceable, sync_sizes
from hipp_ext.kinds.slices import Slice, change_units, chosen_units, tensor_in, tensors_of
from hipp_ext.plan import PruningPlan
from hipp_ext.surgery.compose import plan_in_total
from hipp_ext.surgery.drop import removable_layers, remove_layers, replace_modules, skip_modules
from hipp_ext.surgery.layer_config import write_layer_config
from hipp_ext.surgery.masks import PLAN_ATTRIBUTE, Model, loaded_plan, match
from hipp_ext.surgery.reconstruct import ROWS, reconstructed_weights


def prune(
    model: Model,
    plan: PruningPlan | str | Path,
    *,
    inplace: bool = False,
    reconstruct: bool = False,
    calibration: CalibrationLike | None = None,
    processor: Any = None,
    progress: bool = False,
) -> Model:
    """A physically smaller model: the units that `plan` does not keep are sliced out.

    The result is an ordinary transformers model of the same class: forward, backward and generate
    work, the module tree is the same, only widths differ. A block that keeps no unit becomes a
    `hipp_ext.kinds.Skip`, which costs nothing, and a language layer without any block leaves the
    model. The config carries the widths in the standard `per_layer_config` (or, where all layers
    are alike, as any model's), and `model.hipp_plan` is the plan. Of a model that was pruned before
    it is the dense model's plan, of what stays in total (`compose`). Logits equal those under
    `masked(model, plan)` up to rounding.

    Args:
        model: the model the plan was made for, or one of the same shape.
        plan: from `HiPPPlanner.plan`, `PruningPlan.load`, ...; or the path of a plan file.
        inplace: change `model` itself instead of a copy. The copy holds only what stays, so it
            costs the memory of the small model; in place, `model` is no longer available as the
            dense one.
        reconstruct: also fit the layers that read the units (o_proj, down_proj) to the calibration,
            from the bottom of the model to its top, so that they make up for what their block lost
            and for part of what was lost below; no training. Logits then differ from those under
            `masked`. Gradients of those weights are dropped, they belong to other values;
            requires_grad stays. For its cost see
            `hipp_ext.surgery.reconstruct.reconstructed_weights`.
        calibration: batches to reconstruct on; None: the testbed's, through `processor`. Not read
            otherwise.
        processor: None: the one beside the weights that `model` was loaded from.

    Raises:
        CalibrationError: `reconstruct` without batches, or with batches that do not fit the model.
        PlanError: the plan does not fit; the message says where, and nothing was changed.
        UnsupportedModelError: a layer to be sliced is not a plain floating-point linear layer
            (quantised, adapted, parametrised, or shared with another layer), or reconstruction met
            NaN or infinite activations.
    """
    # Everything that can fail happens before the first change.
    plan = loaded_plan(plan)
    groups = match(model, plan)
    total = plan_in_total(model, plan)
    dropped = [g for g, e in zip(groups, plan.groups, strict=True) if not e.keep]
    smaller = [g for g, e in zip(groups, plan.groups, strict=True) if 0 < e.keep < e.width]
    check_sliceable(model, dropped + smaller)
    parts = _parts(smaller, plan)
    batches: Sequence[Batch] = ()
    if reconstruct:
        batches = Calibration.of(model, calibration, processor, rows=ROWS).batches
    fitted: dict[str, Tensor] = {}
    if reconstruct:
        fitted = reconstructed_weights(model, groups, plan, batches, progress=progress)

    def successor(part: _Part) -> Tensor:
        old = tensor_in(model, part.parameter)
        weight = fitted.pop(part.slices[0].layer, None) if part.is_read else None
        if weight is None:
            return _select(old, part)
        return nn.Parameter(weight, requires_grad=old.requires_grad)

    skips, removed = skip_modules(model, dropped), removable_layers(model, plan)
    if inplace:
        # One at a time, each old weight let go before the next is sliced: the memory of one weight.
        for part in parts:
            owner, attribute = part.parameter.rsplit(".", 1)
            store = tensors_of(model.get_submodule(owner), attribute)
            store[attribute] = successor(part)
        replace_modules(model, skips)
    else:
        # What goes is not copied: the memo hands deepcopy what takes its place.
        memo: dict[int, Any] = {id(model.get_submodule(n)): new for n, new in skips.items()}
        for part in parts:
            memo[id(tensor_in(model, part.parameter))] = successor(part)
        model = copy.deepcopy(model, memo)
        forget_bound_methods(model)
    counts = plan.keep_counts
    for group in smaller:
        sync_sizes(model, group, counts[group.name])
    remove_layers(model, removed)
    write_layer_config(model)
    setattr(model, PLAN_ATTRIBUTE, total)
    return model


def forget_bound_methods(model: nn.Module) -> None:
    """Give a copied model its class's methods back where a host has put its own into the instance.

    llm-compressor does so with `save_pretrained`, accelerate with `to` and `cuda`, all of them
    closures over the model: a copy would hold the same ones, save or move the original, and keep it
    in memory. (accelerate's `forward` is copied rightly.)
    """
    for name in [
        n for n in model.__dict__ if n != "forward" and callable(getattr(type(model), n, None))
    ]:
        del model.__dict__[name]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """A parameter of `width` units that loses some; those of `kept` stay."""

    slices: tuple[Slice, ...]
    width: int
    kept: Tensor
    is_read: bool  # it is the consumer's weight

    @property
    def parameter(self) -> str:
        return self.slices[0].parameter

    def select(self, values: Tensor) -> Tensor:
        return change_units(values, self.slices, self.width, chosen_units(self.kept))


def _parts(groups: Sequence[Group], plan: PruningPlan) -> list[_Part]:
    kept = {e.name: torch.tensor(e.kept) for e in plan.groups}
    return [
        _Part(slices=s, width=g.width, kept=kept[g.name], is_read=s[-1] is g.owns[-1])
        for g in groups
        for s in g.cuts
    ]


@torch.no_grad()
def _select(parameter: Tensor, part: _Part) -> Tensor:
    """What stays of a parameter, its gradient along with it, or of a buffer."""
    if not isinstance(parameter, nn.Parameter):
        return part.select(parameter)
    new = nn.Parameter(part.select(parameter.detach()), requires_grad=parameter.requires_grad)
    if parameter.grad is not None:
        new.grad = part.select(parameter.grad)
    return new
