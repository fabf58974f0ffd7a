"""The plan of a round: made on the model as it is then, counted in units of the dense model."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hipp_ext.allocators import Allocator
from hipp_ext.budget import Bounds, keep_counts
from hipp_ext.budget.bounds import MIN_KEEP
from hipp_ext.budget.counts import parameters_left
from hipp_ext.calibration import Calibration
from hipp_ext.errors import BudgetError
from hipp_ext.files.sealed import digest
from hipp_ext.groups import Group, find_groups, tower_layers
from hipp_ext.plan import PlanGroup, PruningPlan
from hipp_ext.planner import HiPPPlanner
from hipp_ext.surgery.compose import compose, plan_in_total
from hipp_ext.surgery.drop import layer_numbers
from hipp_ext.units import plan_from_counts

Planner = Allocator | HiPPPlanner


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What is left of the dense model, in the units of a planner.

    Attributes:
        total: plan of the dense model that says what stays, in all towers that were pruned or are
            going to be.
        groups: groups of the model as it is, which the planner prunes.
        layers: number of language layers of the model as it is.
    """

    total: PruningPlan
    groups: tuple[Group, ...]
    layers: int

    @classmethod
    def of(cls, model: nn.Module, planner: Planner) -> "Standing":
        """What is left of the model that `model` was pruned from; its plan tells.

        Raises:
            UnsupportedModelError: the model's groups cannot be mapped.
        """
        groups = find_groups(
            model,
            planner.towers,
            attention_unit=planner.attention_unit,
            expert_unit=planner.expert_unit,
            partial=planner.partial,
        )
        layers = len(tower_layers(model, "language"))
        return cls(total=plan_in_total(model, _whole(groups)), groups=groups, layers=layers)

    def round_ratio(self, pruning_ratio: float) -> float:
        """The pruning_ratio of `groups` after which `pruning_ratio` of the dense model is gone; 0
        if as much is gone already.
        """
        dense = sum(g.width * g.unit_parameters for g in self.total.groups)
        removed = self.total.kept_parameters - parameters_left(dense, pruning_ratio)
        # Half a parameter less than that, which does not exist: rounding must not cost a unit.
        return max(0.0, removed - 0.5) / sum(g.width * g.unit_parameters for g in self.groups)

    def bounds(self, bounds: Bounds | None) -> Bounds:
        """`bounds` for `groups`, with `min_keep` counted of the dense model's widths."""
        bounds = bounds or Bounds()
        if bounds.shape == "layers":
            return bounds
        numbers = layer_numbers(self.total, self.layers)
        dense = {
            (e.tower, numbers.get(e.layer) if e.tower == "language" else e.layer, e.place): e
            for e in self.total.groups
            if e.keep
        }
        least = {g.name: _least(bounds, g, dense[g.tower, g.layer, g.place]) for g in self.groups}
        return replace(bounds, min_keep=least)


def check_reach(standing: Standing, planner: Planner, pruning_ratio: float) -> None:
    """Raise BudgetError if more is gone already, or one plan could not reach `pruning_ratio`."""
    ratio = standing.round_ratio(pruning_ratio)
    if not ratio:
        raise BudgetError(
            f"to={pruning_ratio:g}: the model has lost {standing.total.pruning_ratio:.4f} of its "
            "prunable parameters already. Ask for more than that."
        )
    keep_counts(standing.groups, None, ratio, standing.bounds(planner.bounds))


def round_plan(
    model: nn.Module,
    planner: Planner,
    pruning_ratio: float,
    calibration: Calibration,
    processor: Any,
    progress: bool,
) -> PruningPlan:
    """The plan of `model` after which `pruning_ratio` of the dense model is gone.

    Scores and sensitivity are those of the model as it is, against its own outputs: units that
    share the work of removed ones after a recovery are worth more than in the dense model, and the
    Fisher estimate holds where the outputs compared are equal before anything is removed. Where
    the last round removed so much that nothing is missing, as whole layers are large steps, all
    units stay.
    """
    standing = Standing.of(model, planner)
    if not standing.round_ratio(pruning_ratio):
        return _whole(standing.groups)
    options: dict[str, Any] = {
        "pruning_ratio": standing.round_ratio(pruning_ratio),
        "bounds": standing.bounds(planner.bounds),
    }
    if isinstance(planner, Allocator):
        own: Planner = replace(planner, **options)
    else:
        own = copy.copy(planner)
        vars(own).update(options, cache=None)  # signals of a model that is there once
    plan = own.plan(model, processor=processor, calibration=calibration, progress=progress)
    compose(standing.total, plan, standing.layers)  # or the result could not say what stays
    return plan


def planner_identity(planner: Planner) -> str:
    """What must be equal for a run to go on."""
    if isinstance(planner, Allocator):
        return repr(replace(planner, pruning_ratio=0.0))
    names = ("preference", "scorer", "mrs", "bounds", "attention_unit", "expert_unit", "towers")
    own = {name: getattr(planner, name) for name in (*names, "partial", "effort")}
    return f"HiPPPlanner({own}, policy={digest(planner.policy.state_dict())})"


def _whole(groups: Sequence[Group]) -> PruningPlan:
    """The plan that keeps everything."""
    scores = {group.name: torch.zeros(group.width) for group in groups}
    return plan_from_counts(groups, [group.width for group in groups], scores)


def _least(bounds: Bounds, group: Group, dense: PlanGroup) -> float:
    """Least fraction of the units of a group that stays.

    All stay of a block that was pruned in other units before. So do query heads that are left alone
    with their keys, which are KV groups from then on.
    """
    if group.kind != dense.kind:
        return bounds.max_keep
    own = bounds.min_keep
    fraction = own.get(dense.name, MIN_KEEP) if isinstance(own, Mapping) else own
    return min(bounds.max_keep, fraction * dense.width / group.width)
