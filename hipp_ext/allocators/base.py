"""The base class of allocators."""

import abc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from hipp_ext.budget import Bounds, check_ratio, keep_counts, largest_ratio
from hipp_ext.calibration import Calibration, CalibrationLike
from hipp_ext.errors import BudgetError
from hipp_ext.groups import (
    AttentionUnit,
    ExpertUnit,
    Partial,
    Tower,
    check_choices,
    check_towers,
    find_groups,
    left_whole,
)
from hipp_ext.limits import Limits, check_reachable, counts_within
from hipp_ext.plan import PruningPlan
from hipp_ext.scorers import Scorer, WandaSP
from hipp_ext.scorers.base import Groups, Scores
from hipp_ext.sensitivity.efforts import Announce
from hipp_ext.units import plan_from_counts


@dataclass(frozen=True, kw_only=True)
class Allocator(abc.ABC):
    """How many units of every group stay: `Uniform(pruning_ratio=0.3).plan(model)`.

    The scorer ranks the units within a group; the allocator decides how many of them stay. All
    allocators meet the budget within one step of one group and never exceed it. `HiPPPlanner` has
    the same `plan`. A new allocator is a frozen dataclass that implements `keep_counts`, and
    `measure` if it needs the model, and a line in `hipp_ext.allocators.ALLOCATORS`.

    Args:
        pruning_ratio: removed fraction of the prunable parameters, in [0, 1).
        scorer: scorer that ranks the units of a group; None: WandaSP.
        bounds: rounding and floors of the keep counts; None: `Bounds()`.
        attention_unit: "kv" (whole KV groups) or "query" (query heads, see `find_groups`).
        expert_unit: "expert" (whole experts) or "channel" (channels of all experts of a layer).
        towers: what is pruned, under one budget: "language", "vision", "projector" or several of
            them, see `find_groups`.
        partial: "refuse" or "report" a model with parts that can only stay whole, see
            `find_groups`; the plan's `left_whole` lists them.

    Raises:
        BudgetError: pruning_ratio is outside [0, 1), bounds are not Bounds, or a unit, a tower or
            `partial` is unknown.
    """

    pruning_ratio: float
    scorer: Scorer | None = None
    bounds: Bounds | None = None
    attention_unit: AttentionUnit = "kv"
    expert_unit: ExpertUnit = "expert"
    towers: tuple[Tower, ...] = ("language",)
    partial: Partial = "refuse"
    needs_calibration: ClassVar[bool] = False  # for `measure`; scorers have their own flag

    def __post_init__(self) -> None:
        check_ratio(self.pruning_ratio)
        if self.bounds is not None and not isinstance(self.bounds, Bounds):
            raise BudgetError(f"bounds={self.bounds!r}: hipp_ext.budget.Bounds are needed.")
        check_choices(self.attention_unit, self.expert_unit, self.partial)
        object.__setattr__(self, "towers", check_towers(self.towers))

    def plan(
        self,
        model: nn.Module,
        *,
        processor: Any = None,
        calibration: CalibrationLike | None = None,
        limits: Limits | None = None,
        progress: bool = False,
        announce: Announce | None = None,
    ) -> PruningPlan:
        """The plan for `model`, which is never changed.

        Args:
            model: transformers model.
            processor: processor of a vision-language model; None: the one beside its weights.
            calibration: a Calibration, or batches of the tensors that the model's forward takes,
                for all tasks or by task; None: the testbed's, through `processor`.
            limits: memory and latency that the pruned model must not exceed: then more than
                pruning_ratio is removed, if that is needed.
            progress: show on stderr what is measured, and how long it will take.
            announce: called before anything is measured, see `Announce`.

        Raises:
            BudgetError: pruning_ratio or a limit cannot be met within the bounds.
            CalibrationError: no calibration where one is needed, or batches that do not fit.
            UnsupportedModelError: the model's groups cannot be mapped.
        """
        check_model(model)
        units: Any = {"attention_unit": self.attention_unit, "expert_unit": self.expert_unit}
        groups = find_groups(model, self.towers, partial=self.partial, **units)
        scorer = self.scorer or WandaSP()
        # What cannot be met is refused before anything is measured.
        keep_counts(groups, None, self.pruning_ratio, self.bounds)
        excess = (limits or Limits()).check(model, groups)
        check_reachable(excess, groups, self.bounds)
        needed = self.needs_calibration or scorer.needs_calibration
        given = Calibration.of(model, calibration, processor) if needed else None
        if announce is not None and given is not None:
            announce(given, scorer.passes(groups) + self.passes(model, groups, given))
        scores = scorer(model, given, groups=groups)
        measured = self.measure(model, groups, scores, given, progress)
        counts = counts_within(
            excess,
            lambda ratio: replace(self, pruning_ratio=ratio).keep_counts(groups, scores, measured),
            self.pruning_ratio,
            largest_ratio(groups, self.bounds),
        )
        left = left_whole(model)
        return plan_from_counts(groups, counts, scores, scorer=scorer.name, left_whole=left)

    def passes(self, model: nn.Module, groups: Groups, calibration: Calibration) -> float:
        """About how many forward passes over the calibration `measure` will take, in FLOPs."""
        return 1.0 if self.needs_calibration else 0.0

    def measure(
        self,
        model: nn.Module,
        groups: Groups,
        scores: Scores,
        calibration: Calibration | None,
        progress: bool = False,
    ) -> Any:
        """What `keep_counts` needs to know of the model, whatever the pruning_ratio; None: nothing.

        Args:
            model: left as it was found.
            groups: groups to be pruned.
            scores: group name -> score per unit, higher = keep.
            calibration: checked batches; None where neither this nor the scorer needs any.
            progress: show on stderr what is measured, and how long it will take.
        """
        return None

    @abc.abstractmethod
    def keep_counts(self, groups: Groups, scores: Scores, measured: Any) -> tuple[int, ...]:
        """Number of units that stay, for every group; `measured` is what `measure` returned."""


def check_model(model: Any) -> None:
    """Raise TypeError unless `model` is one."""
    if isinstance(model, str | Path):
        raise TypeError(
            f"A model is needed, not the path {str(model)!r}: load it with "
            f"hipp_ext.load_pruned({str(model)!r})."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"A transformers model is needed, not {type(model).__name__}.")
