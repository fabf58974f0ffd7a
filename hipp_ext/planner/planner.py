"""HiPPPlanner: a preference in, a per-layer pruning plan out, in one policy call."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hipp_ext.allocators.base import check_model
from hipp_ext.budget import Bounds, check_ratio, keep_counts, largest_ratio
from hipp_ext.calibration import ROWS, Calibration, CalibrationLike
from hipp_ext.errors import CalibrationError, PlanError
from hipp_ext.fingerprint import model_digest
from hipp_ext.groups import (
    AttentionUnit,
    ExpertUnit,
    Group,
    Partial,
    Tower,
    check_choices,
    check_towers,
    find_groups,
)
from hipp_ext.limits import Excess, Limits, check_reachable, counts_within, no_excess
from hipp_ext.plan import PruningPlan
from hipp_ext.planner.answers import Answers, ParetoPlan
from hipp_ext.planner.archive import Archive
from hipp_ext.planner.cost import CostKind, check_cost, cost_of
from hipp_ext.planner.evaluation import KeepCounts, Workers, plan_rewards
from hipp_ext.planner.fit import run_fit
from hipp_ext.planner.history import FitHistory
from hipp_ext.planner.policy import Policy, new_policy
from hipp_ext.planner.problem import FitProblem
from hipp_ext.planner.reward import Evaluator, Reward, check_evaluator
from hipp_ext.planner.settings import FitResult, FitSettings
from hipp_ext.planner.signal_cache import cached_signals
from hipp_ext.planner.state import FEATURES, Signals, measure_signals
from hipp_ext.planner.storage import read_planner, write_planner
from hipp_ext.preference import Preference
from hipp_ext.quantities import whole
from hipp_ext.scorers import MRS, Scorer, says_all
from hipp_ext.sensitivity.cached import default_cache
from hipp_ext.sensitivity.efforts import Announce, Effort, check_effort
from hipp_ext.units import plan_from_counts

Log = Callable[[str], None]
NOT_FITTED_MESSAGE = (
    "There is no evaluated plan: call fit(model, evaluator), or load a fitted planner."
)


class HiPPPlanner:
    """Turns a preference into a pruning plan.

        plan = HiPPPlanner(Preference(utility=0.4, robustness=0.4, compression=0.2)).plan(model)

    It is the learned allocator: `plan` is that of `hipp_ext.allocators.Allocator`. Without a fit
    the policy equals its prior: the allocator `Sensitivity`, at a budget that follows the weight of
    compression. `fit` trains it by surrogate-assisted, plan-level policy search with GRPO updates.
    Signals are measured on first use and kept for their model.

    Args:
        preference: weights of utility, robustness and compression.
        pruning_ratio: removed fraction of the prunable parameters, in [0, 1); None: the policy
            decides.
        policy: fitted policy; None: an untrained one.
        scorer: scorer that ranks the units within a group; None: WandaSP.
        mrs: also shows the policy the sensitivity of every group under attack; the calibration
            needs labels.
        bounds: rounding and floors of the keep counts.
        attention_unit: "kv" (whole KV groups) or "query" (query heads, see `find_groups`).
        expert_unit: "expert" (whole experts) or "channel" (channels of all experts of a layer).
        towers: what is pruned, under one budget: "language", "vision", "projector" or several of
            them, see `find_groups`.
        partial: "refuse" or "report" a model with parts that can only stay whole, see
            `find_groups`; the plan's `left_whole` lists them.
        effort: how the sensitivity of the groups is found: "fisher" (one backward pass), "anchored"
            (and two measured points of each group) or "measured" (five of them), see
            `measure_sensitivity`.
        seed: random seed of the untrained policy.
        cache: folder where signals are kept for this model and calibration, across processes. True:
            ~/.cache/hipp-ext (or under XDG_CACHE_HOME), as the commands do; None or False: nowhere.
            What an interrupted measurement has finished is kept there, too. With a scorer that is
            not one of `hipp_ext.scorers`, nothing is kept.

    Raises:
        BudgetError: pruning_ratio is outside [0, 1), or the effort, a unit, a tower or `partial`
            is unknown.
        PlanError: `policy` was made for signals with MRS and there is none, or vice versa.

    Attributes:
        signals: signals of the model that was planned for last.
        history: the plans that `fit` evaluated, and what they were evaluated with.

    Source: HiPP-Prune (arXiv 2603.06270). See `Policy`, `grpo` and `VisualSensitivity` for what
    differs from the paper.
    """

    def __init__(
        self,
        preference: Preference,
        *,
        pruning_ratio: float | None = None,
        policy: Policy | None = None,
        scorer: Scorer | None = None,
        mrs: MRS | None = None,
        bounds: Bounds | None = None,
        attention_unit: AttentionUnit = "kv",
        expert_unit: ExpertUnit = "expert",
        towers: Sequence[Tower] = ("language",),
        partial: Partial = "refuse",
        effort: Effort = "anchored",
        seed: int = 0,
        cache: str | Path | bool | None = True,
    ):
        _check_preference(preference)
        if bounds is not None and not isinstance(bounds, Bounds):
            raise TypeError(f"bounds={bounds!r}: hipp_ext.budget.Bounds are needed.")
        if pruning_ratio is not None:
            check_ratio(pruning_ratio)
        check_effort(effort)
        check_choices(attention_unit, expert_unit, partial)
        if (number := whole(seed)) is None or not 0 <= number < 2**63:
            raise PlanError(f"seed={seed!r}: a whole number of 0 or more is needed.")
        self.preference = preference
        self.pruning_ratio = None if pruning_ratio is None else float(pruning_ratio)
        features = FEATURES + (mrs is not None)
        self.policy = policy or new_policy(number, features=features)
        if self.policy.features != features:
            raise PlanError(
                f"The policy sees {self.policy.features} features of a group, and with mrs={mrs} "
                f"there are {features}."
            )
        self.scorer, self.mrs, self.bounds = scorer, mrs, bounds or Bounds()
        self.effort: Effort = effort
        self.attention_unit: AttentionUnit = attention_unit
        self.expert_unit: ExpertUnit = expert_unit
        self.towers = check_towers(towers)
        self.partial: Partial = partial
        self.cache = default_cache() if cache is True else Path(cache) if cache else None
        self.signals: Signals | None = None
        self._rows: int | None = None  # of the built-in calibration of the signals, if it is known
        self.history = FitHistory()

    @property
    def archive(self) -> Archive:
        """Every plan that `fit` evaluated."""
        return self.history.archive

    def plan(
        self,
        model: nn.Module,
        *,
        processor: Any = None,
        calibration: CalibrationLike | None = None,
        rows: int | None = None,
        preference: Preference | None = None,
        best_evaluated: bool = False,
        limits: Limits | None = None,
        log: Log | None = None,
        progress: bool = False,
        announce: Announce | None = None,
    ) -> PruningPlan:
        """The plan for a preference. It never changes `model`.

        Args:
            model: transformers model.
            processor: processor of a vision-language model; None: the one beside its weights.
            calibration: a Calibration, batches, or {"utility": batches, "robustness": batches};
                by task, a preference for one task keeps what that task's answers depend on.
                None: the signals measured before, if they are of this model; else the testbed's
                questions, by task, which are about a toy world. On another calibration than that of
                the signals measured before, everything is measured again.
            rows: number of the testbed's questions; None: as for the signals measured before,
                else 64. 256 give a better sensitivity.
            preference: weights of the objectives; None: the planner's own.
            best_evaluated: return the best plan that `fit` evaluated on this model instead of the
                policy's: its reward is known (see `answers`). With a fixed pruning_ratio it removes
                that much or more.
            limits: memory and latency that the pruned model must not exceed: then more is removed
                than the policy or pruning_ratio says, if that is needed.
            log: called with a line before each measurement.
            progress: show on stderr what is measured, and how long it will take.
            announce: called before anything is measured, see `Announce`; not called where the
                signals are known.

        Raises:
            BudgetError: pruning_ratio or a limit cannot be met within the bounds.
            CalibrationError: there is no calibration, or it does not fit the model.
            PlanError: `best_evaluated`, and the planner was not fitted, or not on this model with
                these scores, or no evaluated plan removes enough within the bounds and limits.
            UnsupportedModelError: the model's groups cannot be mapped.
        """
        if best_evaluated and not len(self.archive):
            raise PlanError(NOT_FITTED_MESSAGE)
        preference = self.preference if preference is None else preference
        _check_preference(preference)
        self._check_reach(model)
        groups = self._groups(model)
        excess = (limits or Limits()).check(model, groups)
        check_reachable(excess, groups, self.bounds)
        signals = self.measure(
            model,
            processor=processor,
            calibration=calibration,
            rows=rows,
            log=log,
            progress=progress,
            announce=announce,
        )
        if best_evaluated:
            self._fitted_signals()
            counts = self._best(signals, preference, excess)
        else:
            counts = self._decide(signals, preference, excess)
        return self._plan(signals, counts, preference)

    def _check_reach(self, model: nn.Module) -> None:
        """Raise BudgetError if pruning_ratio cannot be met, before anything is measured."""
        check_model(model)
        if self.pruning_ratio is not None:
            keep_counts(self._groups(model), None, self.pruning_ratio, self.bounds)

    def _groups(self, model: nn.Module) -> tuple[Group, ...]:
        units: Any = {"attention_unit": self.attention_unit, "expert_unit": self.expert_unit}
        return find_groups(model, self.towers, partial=self.partial, **units)

    @torch.inference_mode(False)  # tensors of the signals are kept, and a fit may need gradients
    def _decide(
        self, signals: Signals, preference: Preference, excess: Excess = no_excess
    ) -> KeepCounts:
        limit, seen = largest_ratio(signals.groups, self.bounds), signals.within(self.bounds)

        def counts_at(pruning_ratio: float) -> KeepCounts:
            _, allocation = self.policy.decide(seen, preference, pruning_ratio, limit)
            return keep_counts(signals.groups, allocation, pruning_ratio, self.bounds)

        ratio, allocation = self.policy.decide(seen, preference, self.pruning_ratio, limit)
        counts = keep_counts(signals.groups, allocation, ratio, self.bounds)
        return counts_within(excess, counts_at, ratio, limit) if excess(counts) else counts

    @torch.inference_mode(False)
    def measure(
        self,
        model: nn.Module,
        *,
        processor: Any = None,
        calibration: CalibrationLike | None = None,
        rows: int | None = None,
        log: Log | None = None,
        progress: bool = False,
        announce: Announce | None = None,
    ) -> Signals:
        """The signals of `model` on this calibration: measured before, cached, or new ones.

        Arguments as for `plan`.
        """
        check_model(model)
        if rows is not None and ((number := whole(rows)) is None or number < 2):
            raise CalibrationError(
                f"rows={rows!r}: a whole number of 2 or more is needed, a question for each task."
            )
        before, asked = self._signals_of(model), rows or self._rows
        groups = self._groups(model)
        if before and (before.effort != self.effort or before.groups != groups):
            before = None
        # Without a calibration, any signals of the model will do, unless rows or a processor ask
        # for certain built-in questions.
        any_will_do = calibration is None and rows is None and (processor is None or asked is None)
        if before and any_will_do:
            return before
        given = Calibration.of(model, calibration, processor, int(asked or ROWS))
        if before and given.digest == before.calibration:
            return before
        if before and log:
            log("another calibration than that of the known signals: measuring again")
        options: Any = {"mrs": self.mrs, "effort": self.effort, "groups": groups}
        options |= {"log": log, "progress": progress}
        options |= {"scorer": self.scorer, "announce": announce}
        named = all(s is None or says_all(s) for s in (self.scorer, self.mrs))
        if self.cache is not None and named:
            self.signals = cached_signals(model, given, self.cache, **options)
        else:
            self.signals = measure_signals(model, given, **options)
        self._rows = int(asked or ROWS) if calibration is None else None
        return self.signals

    def _signals_of(self, model: nn.Module) -> Signals | None:
        """The signals that were measured before, if they are of `model` as it is."""
        known = self.signals
        same = known is not None and model_digest(model, known.groups) == known.digest
        return known if same else None

    @torch.inference_mode(False)
    def fit(
        self,
        model: nn.Module,
        evaluator: Evaluator,
        settings: FitSettings | None = None,
        *,
        folder: str | Path | None = None,
        cost: CostKind = "parameters",
        processor: Any = None,
        calibration: CalibrationLike | None = None,
        rows: int | None = None,
        progress: bool = True,
        log: Log | None = None,
    ) -> FitResult:
        """Train the policy on measured plans; `plan` and `front` then use what it learned.

        Under `torchrun` every process calls it alike, with its own model and evaluator. The first
        one decides and writes, all of them evaluate plans, and all end with the same policy and
        archive: those of a single process, if it computes with as many threads. An interrupted fit
        leaves the planner as it was.

        Args:
            model: sliced while plans are evaluated, see `sliced`; otherwise left as it was.
            evaluator: model -> {"utility": ..., "robustness": ...}, higher = better, on the same
                data at every call. "utility_se" and "robustness_se" give the front its error bars.
                Its attribute `digest`, if it has one, identifies the data; `towers` says of which
                towers it can evaluate plans.
            settings: how many plans, how they are drawn, the seed; None: the defaults.
            folder: folder of checkpoint and archive, from which an interrupted fit (ctrl-C or
                kill -9) resumes and ends as if it had not been interrupted. None: nothing is kept.
            cost: what the objective "compression" counts: "parameters" or "flops". A pruning_ratio
                always counts parameters.
            processor: as for `plan`.
            calibration: as for `plan`.
            rows: as for `plan`.
            progress: show a progress bar.
            log: called with a line before each measurement.

        Raises:
            BudgetError: pruning_ratio cannot be met within the bounds, or the cost is unknown.
            CalibrationError: as for `plan`.
            CheckpointError: `folder` holds another fit, or is damaged.
            DataError: the evaluator returns something else than finite numbers, or it computes
                what comes before the language tower only once, and the towers are others.
            UnsupportedModelError: a layer cannot be sliced (quantised, adapted, offloaded).
        """
        check_cost(cost)
        check_evaluator(evaluator, self.towers)
        self._check_reach(model)
        workers = Workers()
        mine = self.measure(
            model,
            processor=processor,
            calibration=calibration,
            rows=rows,
            log=log,
            progress=progress and workers.leads,
        )
        signals = workers.share(mine)
        problem = FitProblem(
            signals=signals.within(self.bounds),
            settings=settings or FitSettings(),
            cost=cost_of(signals.groups, cost),
            bounds=self.bounds,
            pruning_ratio=self.pruning_ratio,
            mrs=self.mrs and self.mrs.name,
        )
        kept = None if folder is None else Path(folder)
        policy, history, result = run_fit(
            self.policy, model, evaluator, problem, workers, kept, progress
        )
        if result.steps:
            self.policy = policy
        self.signals, self.history = signals, history
        return result

    def front(self) -> list[ParetoPlan]:
        """The non-dominated evaluated plans, by pruning_ratio, with their measured rewards.

        Raises:
            PlanError: the planner was not fitted, or its signals are now those of another model.
        """
        signals = self._fitted_signals()
        return [
            ParetoPlan(plan=self._plan(signals, r.keep_counts, None), reward=r.reward)
            for r in self.archive.front()
        ]

    def answers(self, preference: Preference | None = None) -> Answers:
        """The policy's plan and the best evaluated plan for a preference, without the model.

        Args:
            preference: weights of the objectives; None: the planner's own.

        Raises:
            PlanError: the planner was not fitted, its signals are now those of another model, or no
                evaluated plan removes enough.
        """
        preference, signals = preference or self.preference, self._fitted_signals()
        both = self._best(signals, preference), self._decide(signals, preference)
        best, policy = (
            ParetoPlan(plan=self._plan(signals, c, preference), reward=self.history.reward(c))
            for c in both
        )
        return Answers(policy=policy, best_evaluated=best)

    def _best(
        self, signals: Signals, preference: Preference, excess: Excess = no_excess
    ) -> KeepCounts:
        bounds, ratio = self.bounds, self.pruning_ratio
        return self.history.best(preference, signals.groups, bounds, ratio, excess).keep_counts

    def _fitted_signals(self) -> Signals:
        """The signals, if the archive's plans keep the units that they were evaluated with."""
        if self.signals is None or not len(self.archive):
            raise PlanError(NOT_FITTED_MESSAGE)
        if self.signals.ranking != self.history.ranking:
            raise PlanError(
                "The archive's plans were evaluated on another model, or with its units ranked by "
                "other scores (another scorer or calibration). Fit on this one, or take the "
                "policy's plan."
            )
        return self.signals

    def rewards(
        self, model: nn.Module, plans: Sequence[PruningPlan], evaluator: Evaluator
    ) -> list[Reward]:
        """The rewards of plans of this planner; compression counts what the fit rewarded.

        Raises:
            PlanError: the planner has no signals of `model`, or a plan keeps other units than those
                with the highest scores.
            DataError: the evaluator returns something else than finite numbers.
        """
        if (signals := self._signals_of(model)) is None:
            raise PlanError(
                "The planner has no signals of this model; call plan(model) or "
                "fit(model, evaluator) first."
            )
        counts = [tuple(plan.keep_counts.get(g.name, 0) for g in signals.groups) for plan in plans]
        for plan, kept in zip(plans, counts, strict=True):
            if plan.groups != self._plan(signals, kept, None).groups:
                raise PlanError(
                    "A plan keeps other units than this planner's scores rank first; evaluate it "
                    "under masked()."
                )
        check_evaluator(evaluator, self.towers)
        cost = cost_of(signals.groups, self.history.cost or "parameters")
        with plan_rewards(model, evaluator, signals, cost) as measure_one:
            return [measure_one(kept) for kept in counts]

    def _plan(
        self, signals: Signals, counts: KeepCounts, preference: Preference | None
    ) -> PruningPlan:
        return plan_from_counts(
            signals.groups,
            counts,
            signals.scores,
            scorer=signals.scorer,
            preference=preference.as_tuple() if preference else None,
            left_whole=signals.left_whole,
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the planner to the folder `path`, whole or not at all."""
        write_planner(path, self, overwrite)

    @classmethod
    def load(
        cls, path: str | Path, *, scorer: Scorer | None = None, mrs: MRS | None = None
    ) -> "HiPPPlanner":
        """The planner that `save` wrote.

        Args:
            path: folder of the planner.
            scorer: scorer that it was made with; only needed if it is not one of
                `hipp_ext.scorers` with default settings.
            mrs: the same for `mrs`.

        Raises:
            CheckpointError: the folder is missing, incomplete or damaged.
            PlanError: a scorer has to be given, or another one is.
        """
        return read_planner(cls, Path(path), scorer, mrs)


def _check_preference(preference: Any) -> None:
    if not isinstance(preference, Preference):
        raise TypeError(f"A Preference is needed, not {preference!r}.")
