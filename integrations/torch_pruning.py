"""Plans in torch-pruning, also where its stock pruner hangs, corrupts, or does nothing.

    pruner = PlanPruner(model, example_inputs, plan=plan)  # any model that hipp_ext.prune takes
    pruner = tp.pruner.BasePruner(model, example_inputs, **to_tp_kwargs(plan, model))  # or this
    pruner.step()

Both, and `hipp_ext.prune(model, plan)`, leave the same weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import nn

from hipp_ext.errors import CalibrationError, PlanError, UnsupportedModelError
from hipp_ext.groups import Group
from hipp_ext.integrations.torch_pruning_channels import (
    ChannelGroup,
    channel_mrs,
    find_channel_groups,
    prune_channels,
)
from hipp_ext.integrations.torch_pruning_importance import (
    HippImportance,
    TorchPruningScorer,
    channel_taylor,
    columns_of,
    linear,
    tp,
    traceless_group,
)
from hipp_ext.integrations.torch_pruning_stock import confirm, to_tp_kwargs
from hipp_ext.modes import call, evaluating
from hipp_ext.plan import PlanGroup, PruningPlan
from hipp_ext.surgery.masks import groups_of, match
from hipp_ext.surgery.prune import prune

__all__ = [
    "ChannelGroup",
    "HippImportance",
    "PlanPruner",
    "TorchPruningScorer",
    "UnitGroup",
    "channel_mrs",
    "channel_taylor",
    "confirm",
    "find_channel_groups",
    "prune_channels",
    "to_tp_kwargs",
]


class PlanPruner:
    """torch-pruning's pruner interface over a plan: `step()` prunes `model` in place.

    Nothing is traced: no autograd, no `use_cache=False`, any attention implementation; frozen
    weights stay frozen, gradients come along, train/eval stays as it was. `model.hipp_plan` is the
    plan, or that of the dense model for a model that was pruned before. The plan already says
    which units go, so there is no importance: to let a torch-pruning importance choose them, make
    the plan with `TorchPruningScorer`.

    Args:
        model: the model the plan was made for.
        example_inputs: a mapping, a sequence or a tensor, as for the stock pruner. The model runs
            on them once here and once after pruning, so that a forward which fails with the new
            widths is noticed. None: no such check.
        plan: what stays.
        forward_fn: (model, example_inputs) -> anything; None: the inputs are unpacked into the
            model's call.

    Raises:
        PlanError: the plan does not fit the model.
        CalibrationError: the model does not run on `example_inputs`.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any = None,
        *,
        plan: PruningPlan,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    ):
        self.model, self.example_inputs, self.plan = model, example_inputs, plan
        self.forward_fn = forward_fn or call
        match(model, plan)
        self._history: list[list[Any]] = []
        self._done = False
        if (error := self._failure()) is not None:
            raise CalibrationError(
                f"{type(model).__name__} does not run on example_inputs: {error}"
            ) from error

    @overload
    def step(self, interactive: Literal[False] = False) -> None: ...
    @overload
    def step(self, interactive: Literal[True]) -> "Iterator[UnitGroup]": ...
    def step(self, interactive: bool = False) -> "Iterator[UnitGroup] | None":
        """Carry the plan out.

        Args:
            interactive: yield the groups that lose units, layer by layer, and prune nothing:
                `group.prune()` does, and a group that is passed over stays whole.

        Raises:
            PlanError: it was carried out before; or interactive, and the plan drops blocks.
            UnsupportedModelError: a layer cannot be sliced (nothing was changed; interactive: by
                this group), or the model does not run on `example_inputs` any more.
        """
        self._check_not_done()
        if interactive:
            if any(not e.keep for e in self.plan.groups):
                raise PlanError(
                    "Blocks that keep nothing are dropped together, because layers then change "
                    "their "
                    "numbers: call step() without interactive=True."
                )
            self._done = True
            return self._yield_groups()
        self._reduce({e.name: e.kept for e in self.plan.groups})
        self._done = True
        self._check_forward()
        return None

    def pruning_history(self) -> list[list[Any]]:
        """[layer name, whether output channels, removed channels] per pruned group, in order."""
        return [list(entry) for entry in self._history]

    def load_pruning_history(self, pruning_history: Sequence[Sequence[Any]]) -> None:
        """Repeat a pruning history on a model as it was before it, instead of the plan.

        Histories of the stock pruner are understood as far as they remove whole units.

        Raises:
            PlanError: an entry is not about a group of the plan, or removes parts of units, or
                other numbers of query heads from every KV group (nothing was changed).
        """
        self._check_not_done()
        groups = match(self.model, self.plan)
        left = {e.name: list(range(e.width)) for e in self.plan.groups}
        for name, is_out, channels in pruning_history:
            group, size = _owner(groups, name, is_out)
            gone = whole_units(group.name, channels, size, len(left[group.name]))
            left[group.name] = [u for i, u in enumerate(left[group.name]) if i not in gone]
        self._reduce(left, record=False)
        self._done = True
        self._history.extend(
            [name, bool(is_out), list(channels)] for name, is_out, channels in pruning_history
        )
        self._check_forward()

    def _check_not_done(self) -> None:
        if self._done:
            raise PlanError(
                "This plan was carried out already; its units are those of the model before. Make "
                "a plan for the model as it "
                "is now, and a new PlanPruner."
            )

    def _yield_groups(self) -> "Iterator[UnitGroup]":
        for group, entry in zip(match(self.model, self.plan), self.plan.groups, strict=True):
            if entry.keep < entry.width:
                yield UnitGroup(self, group, sorted(set(range(entry.width)) - set(entry.kept)))
        self._check_forward()

    def _reduce(self, kept: Mapping[str, Sequence[int]], record: bool = True) -> None:
        """Prune the groups in `kept` to these of their present units, in one surgery.

        `prune` composes the plan with those before it, of this pruner or of others.
        """
        groups = groups_of(self.model, self.plan).values()
        entries = [
            PlanGroup(
                tower=g.tower,
                layer=g.layer,
                kind=g.kind,
                width=g.width,
                unit_parameters=g.unit_parameters,
                sections=g.sections,
                kept=tuple(kept.get(g.name, range(g.width))),
            )
            for g in groups
        ]
        prune(self.model, self.plan.replace(groups=tuple(entries)), inplace=True)
        for group, entry in zip(groups, entries, strict=True):
            if record and entry.keep < entry.width:
                gone = sorted(set(range(entry.width)) - set(entry.kept))
                self._history.append([group.consumer, False, columns_of(gone, group.columns)])

    def _failure(self) -> Exception | None:
        if self.example_inputs is None:
            return None
        try:
            with evaluating(self.model), torch.no_grad():
                self.forward_fn(self.model, self.example_inputs)
        except Exception as error:  # whatever a model's forward raises
            return error
        return None

    def _check_forward(self) -> None:
        if (error := self._failure()) is not None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} ran on example_inputs before it was pruned and does "
                f"not now ({error}): its "
                "forward takes sizes from elsewhere than its layers. The plan has been carried out."
            ) from error


class UnitGroup(tp.Group):
    """A torch-pruning group that removes whole units through hipp_ext's surgery.

    Attributes:
        name: name of the group in plans and scores, such as "language.3.ffn".
        units: those that `prune()` removes.
    """

    def __init__(self, pruner: PlanPruner, group: Group, units: Sequence[int]):
        super().__init__()
        self.name, self.units = group.name, tuple(units)
        self._pruner, self._unit_group = pruner, group
        traceless_group(pruner.model, group, units, into=self)

    def prune(self, idxs: Sequence[int] | None = None, record_history: bool = True) -> None:
        """Remove the planned units, or those whose input columns of the group's root are `idxs`.

        Raises:
            PlanError: `idxs` are not whole units (or not the same number of query heads from every
                KV group), or the group was pruned before.
        """
        group, model = self._unit_group, self._pruner.model
        if linear(model, group.consumer).in_features != group.width * group.columns:
            raise PlanError(
                f"{group.name} was pruned already; its indices are those of the layer before."
            )
        gone = (
            set(self.units)
            if idxs is None
            else whole_units(group.name, idxs, group.columns, group.width)
        )
        self._pruner._reduce(
            {group.name: [u for u in range(group.width) if u not in gone]}, record=record_history
        )


def whole_units(name: str, channels: Sequence[int], size: int, width: int) -> set[int]:
    """The units, of `size` channels each, in `channels`; PlanError unless all of them are whole."""
    units = {int(c) // size for c in channels}
    if sorted(int(c) for c in channels) != columns_of(sorted(units), size) or not units <= set(
        range(width)
    ):
        raise PlanError(
            f"{name} has {width} units of {size} channels; these are not whole units of it: "
            f"{list(channels)[:20]}"
        )
    if len(units) == width:
        raise PlanError(f"{name}: all {width} units were to be removed; one at least must stay.")
    return units


def _owner(groups: Sequence[Group], name: str, is_out: bool) -> tuple[Group, int]:
    """(group that owns the output or input channels of a layer, channels per unit)."""
    for group in groups:
        if not is_out and name == group.consumer:
            return group, group.columns
        rows = [part.size for part in group.produced if part.layer == name]
        if is_out and len(rows) == 1:  # not a fused projection, whose units own several parts
            return group, rows[0]
    side = "output" if is_out else "input"
    raise PlanError(
        f"The {side} channels of {name} belong to no group of the plan, whose groups are "
        f"{[g.name for g in groups][:6]}."
    )
