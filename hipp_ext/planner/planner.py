"""HiPPPlanner: a preference in, a per-layer pruning plan out, in one policy call."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hipp_ext.allocators.base import check_model
from hipp_ext.budget import Bounds, check_ratio, keep_counts, largest_ratio
from hipp_ext.calibration import ROWS, Calibration, CalibrationLike
from hipp_ext.errors import CalibrationError, PlanError
from hipp_ext.groups import find_groups
from hipp_ext.plan import PruningPlan
from hipp_ext.planner.archive import Archive, Record
from hipp_ext.planner.cost import CostKind, check_cost, fit_cost, measure_cost
from hipp_ext.planner.evaluation import Keeps, Workers, plan_rewards
from hipp_ext.planner.experience import Experience
from hipp_ext.planner.fit import FitResult, FitSettings, Trainer
from hipp_ext.planner.policy import Policy, new_policy
from hipp_ext.planner.reward import Evaluator, Reward
from hipp_ext.planner.signal_cache import cached_signals, default_cache
from hipp_ext.planner.state import FEATURES, Signals, measure_signals, model_digest
from hipp_ext.planner.storage import Saved, read_planner, write_planner
from hipp_ext.preference import Preference
from hipp_ext.quantities import whole
from hipp_ext.scorers import MRS, Scorer
from hipp_ext.units import plan_from_counts

Say = Callable[[str], None]
UNFITTED = "There is no evaluated plan: call fit(model, evaluator), or load a fitted planner."


@dataclass(frozen=True, kw_only=True)
class FrontPlan:
    """A plan with what was measured of it."""

    plan: PruningPlan
    reward: Reward | None


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Two answers to one preference.

    Attributes:
        policy: the plan of one policy call; its reward is None where it was never evaluated (see `HiPPPlanner.rewards`).
        archived: the evaluated plan that serves the preference best.
    """

    policy: FrontPlan
    archived: FrontPlan

    def verdict(self) -> str:
        """Which of the two dominates, in a sentence."""
        ours, theirs = self.policy.reward, self.archived.reward
        assert theirs is not None
        if self.policy.plan.keep_counts == self.archived.plan.keep_counts:
            return "They are the same plan."
        if ours is None:
            return "The policy's plan was not evaluated; with the model at hand it can be (`hipp front --model`)."
        if ours.dominates(theirs):
            return "The policy's plan dominates the archived one."
        if theirs.dominates(ours):
            return "The archived plan dominates the policy's: take it (`hipp plan --archived`), or fit longer."
        return "Neither dominates the other."


class HiPPPlanner:
    """Turns a preference into a pruning plan.

        plan = HiPPPlanner(Preference(utility=0.4, robustness=0.4, compression=0.2)).plan(model)

    Without a fit the policy is its prior: measured sensitivity says where to prune, the preference for compression how much.
    `fit` trains it on what evaluated plans tell. Signals are measured on first use and kept for their model.

    Args:
        preference: what is wanted.
        pruning_ratio: parameters removed / prunable parameters, in [0, 1); None: the policy decides.
        policy: a fitted policy; None: an untrained one.
        scorer: ranks the units within a group; None: WandaSP.
        mrs: also shows the policy how sensitive every group is under attack, where robustness means that; the calibration needs
            labels.
        bounds: rounding and floors of the keep counts.
        seed: of the untrained policy.
        cache: where signals are kept on disk, for this model and calibration, across processes: a folder, or True for
            ~/.cache/hipp-ext (under XDG_CACHE_HOME, if set), as the commands do; None or False: nowhere. What a scorer of one's
            own says is not kept.

    Raises:
        BudgetError: pruning_ratio is outside [0, 1).
        PlanError: `policy` was made to see MRS and there is none, or the other way round.

    Attributes:
        signals: of the model last asked about.
        experience: the plans that `fit` evaluated, and how.

    Source: HiPP-Prune (arXiv 2603.06270). What is its own and what ours: `Policy`, `grpo`, `VisualSensitivity`.
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
        seed: int = 0,
        cache: str | Path | bool | None = True,
    ):
        if not isinstance(preference, Preference):
            raise TypeError(f"A Preference is needed, not {preference!r}.")
        if bounds is not None and not isinstance(bounds, Bounds):
            raise TypeError(f"bounds={bounds!r}: hipp_ext.budget.Bounds are needed.")
        if pruning_ratio is not None:
            check_ratio(pruning_ratio)
        if (number := whole(seed)) is None or not 0 <= number < 2**63:
            raise PlanError(f"seed={seed!r}: a whole number of 0 or more is needed.")
        self.preference = preference
        self.pruning_ratio = None if pruning_ratio is None else float(pruning_ratio)
        features = FEATURES + (mrs is not None)
        self.policy = policy or new_policy(number, features=features)
        if self.policy.features != features:
            raise PlanError(
                f"The policy sees {self.policy.features} features of a group, and with mrs={mrs} there are {features}."
            )
        self.mrs = mrs
        self.scorer, self.bounds = scorer, bounds or Bounds()
        self.cache = default_cache() if cache is True else Path(cache) if cache else None
        self.signals: Signals | None = None
        self._rows: int | None = (
            None  # of the built-in calibration that the signals were measured on, where that is known
        )
        self.experience = Experience()

    @property
    def archive(self) -> Archive:
        """Every plan that `fit` evaluated."""
        return self.experience.archive

    def plan(
        self,
        model: nn.Module,
        *,
        processor: Any = None,
        calibration: CalibrationLike | None = None,
        rows: int | None = None,
        preference: Preference | None = None,
        archived: bool = False,
        say: Say | None = None,
        progress: bool = False,
    ) -> PruningPlan:
        """The plan for `preference` (None: the planner's own). Never changes `model`.

        Args:
            archived: of the plans that `fit` evaluated on this model the one that serves the preference best, instead of the
                policy's: what it achieves is known (`choices` tells), but there are only so many. Where pruning_ratio is fixed,
                it removes that much or more.
            processor: of a vision-language model; None: the one beside the model's weights.
            calibration: a Calibration, batches, or {"utility": batches, "robustness": batches}: with
                batches by task, a preference for one task keeps what that task's answers depend on.
                None: the signals measured before, if they are of this model; else the testbed's
                questions, by task, which are about a toy world. On another calibration than that of
                the signals measured before, everything is measured again.
            rows: of the built-in calibration; None: those of the signals at hand, else 64. 256 tell sensitivity better.
            say: called with a line before every measurement.
            progress: show how many groups are measured, on stderr; on a large model that takes minutes.

        Raises:
            BudgetError: pruning_ratio cannot be met within the bounds.
            CalibrationError: there is nothing to calibrate on, or it does not fit the model.
            PlanError: `archived`, and the planner was not fitted, not on this model with these scores, or no evaluated plan
                removes enough within the bounds.
            UnsupportedModelError: the model's groups cannot be mapped.
        """
        if archived and not len(self.archive):
            raise PlanError(UNFITTED)
        if preference is not None and not isinstance(preference, Preference):
            raise TypeError(f"A Preference is needed, not {preference!r}.")
        check_model(model)
        self._check_reach(model)
        wanted = preference or self.preference
        signals = self.measure(
            model,
            processor=processor,
            calibration=calibration,
            rows=rows,
            say=say,
            progress=progress,
        )
        if archived:
            self._check_experience()
            return self._plan(signals, self._best(signals, wanted).keeps, wanted)
        return self._plan(signals, self._decide(signals, wanted), wanted)

    def _check_reach(self, model: nn.Module) -> None:
        """Raise BudgetError if pruning_ratio cannot be met, before anything is measured."""
        if self.pruning_ratio is not None:
            keep_counts(find_groups(model), None, self.pruning_ratio, self.bounds)

    @torch.inference_mode(
        False
    )  # what is computed of the signals is kept, and a fit may learn from it
    def _decide(self, signals: Signals, wanted: Preference) -> Keeps:
        limit = largest_ratio(signals.groups, self.bounds)
        ratio, allocation = self.policy.decide(signals, wanted, self.pruning_ratio, limit)
        return keep_counts(signals.groups, allocation, ratio, self.bounds)

    @torch.inference_mode(False)
    def measure(
        self,
        model: nn.Module,
        *,
        processor: Any = None,
        calibration: CalibrationLike | None = None,
        rows: int | None = None,
        say: Say | None = None,
        progress: bool = False,
    ) -> Signals:
        """The model's signals: those at hand if they are of these weights and this calibration, else cached or new ones.

        Arguments as for `plan`.
        """
        check_model(model)
        if rows is not None and ((number := whole(rows)) is None or number < 2):
            raise CalibrationError(
                f"rows={rows!r}: a whole number of 2 or more is needed, a question for each task."
            )
        there = (
            self.signals is not None
            and model_digest(model, self.signals.groups) == self.signals.digest
        )
        asked = rows or self._rows
        # Signals of whatever calibration serve who names none; who names rows or a processor may mean others.
        if (
            there
            and calibration is None
            and (rows is None and (processor is None or asked is None))
        ):
            return self.signals  # type: ignore[return-value]
        given = Calibration.of(model, calibration, processor, int(asked or ROWS), say)
        if there and given.digest == self.signals.calibration:  # type: ignore[union-attr]
            return self.signals  # type: ignore[return-value]
        if there and say:
            say("another calibration than that of the signals at hand: measuring again")
        wanted: Any = {"mrs": self.mrs, "progress": say, "bar": progress}
        if self.cache is not None and self.scorer is None:
            self.signals = cached_signals(model, given, self.cache, **wanted)
        else:
            self.signals = measure_signals(model, given, scorer=self.scorer, **wanted)
        self._rows = int(asked or ROWS) if calibration is None else None
        return self.signals

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
        say: Say | None = None,
    ) -> FitResult:
        """Train the policy by plan-level GRPO on `evaluator`; afterwards `plan` and `front` draw on what was learned.

        Under `torchrun` every process calls it alike, with a model and an evaluator of its own; the first one decides and
        writes, all of them evaluate plans, and all end with the same policy and archive: those of a single process, if it
        computes with as many threads.

        Args:
            model: shrunk while plans are evaluated, see `sliced`; otherwise left alone.
            evaluator: model -> {"utility": ..., "robustness": ...}, higher = better, the same data at every call;
                "utility_se" and "robustness_se" give the front its error bars. Its attribute `digest`, if it has one, says
                which data that is.
            settings: how many plans, how they are drawn, the seed.
            folder: for checkpoint and archive. A fit that was interrupted, by ctrl-C or kill -9, goes on from there and
                ends as if it had not been. None: nothing is kept.
            cost: what the objective "compression" counts: "parameters", "flops" or measured "latency". A pruning_ratio is
                always of parameters.
            processor, calibration, rows: as for `plan`.
            progress: show a progress bar.

        Raises:
            BudgetError: an unknown cost, or pruning_ratio cannot be met within the bounds.
            CheckpointError: the folder holds a fit with other settings or is damaged.
            DataError: the evaluator returns something else than finite numbers.
            UnsupportedModelError: a layer cannot be sliced (quantised, adapted, offloaded).
        """
        check_cost(cost)
        check_model(model)
        self._check_reach(model)
        settings, workers = settings or FitSettings(), Workers()
        questions, shown = getattr(evaluator, "digest", None), progress and workers.leads
        mine = self.measure(
            model, processor=processor, calibration=calibration, rows=rows, say=say, progress=shown
        )
        signals = workers.share(mine)
        path = Path(folder) if folder is not None else None
        price = workers.share(
            fit_cost(model, signals.groups, cost, path) if workers.leads else None
        )
        policy = copy.deepcopy(self.policy)  # an interrupted fit leaves the planner as it was
        dense, result = {}, None
        with plan_rewards(model, evaluator, signals, price) as measure_one:
            if workers.leads:
                with workers.leading(measure_one) as measure_many:
                    everything = measure_many([tuple(g.width for g in signals.groups)])[0]
                    dense = {"utility": everything.utility, "robustness": everything.robustness}
                    trainer = Trainer(
                        policy,
                        signals,
                        measure_many,
                        settings,
                        cost=price,
                        pruning_ratio=self.pruning_ratio,
                        bounds=self.bounds,
                        folder=path,
                        dense=dense,
                        evaluator=questions,
                        mrs=self.mrs and self.mrs.name,
                        at_once=workers.count,
                    )
                    result = trainer.run(progress)
            else:
                workers.serve(measure_one)
        learned: Any = workers.share(
            (policy.state_dict(), trainer.archive.records, dense, result) if workers.leads else None
        )
        state, records, dense, result = learned
        policy.load_state_dict(state)
        if result.steps:
            self.policy = policy
        self.signals = signals
        self.experience = Experience(
            records=records, ranking=signals.ranking, cost=price, dense=dense, evaluator=questions
        )
        return result

    def front(self) -> list[FrontPlan]:
        """The non-dominated plans among all that `fit` evaluated, by pruning_ratio, each with its measured reward.

        Raises:
            PlanError: the planner was not fitted, or its signals are another model's by now.
        """
        signals = self._check_experience()
        return [
            FrontPlan(plan=self._plan(signals, r.keeps, None), reward=r.reward)
            for r in self.archive.front()
        ]

    def choices(self, preference: Preference | None = None) -> "Choices":
        """For a preference, what the policy would do and the best plan that `fit` evaluated, without the model.

        Raises:
            PlanError: the planner was not fitted, its signals are another model's by now, or no evaluated plan removes enough.
        """
        wanted, signals = preference or self.preference, self._check_experience()
        best = self._best(signals, wanted)
        policy, archived = (
            FrontPlan(plan=self._plan(signals, keeps, wanted), reward=self.experience.reward(keeps))
            for keeps in (self._decide(signals, wanted), best.keeps)
        )
        return Choices(policy=policy, archived=archived)

    def _best(self, signals: Signals, wanted: Preference) -> Record:
        return self.experience.best(wanted, signals.groups, self.bounds, self.pruning_ratio)

    def _check_experience(self) -> Signals:
        """The signals at hand, if the archive's plans keep the units that they did when they were evaluated."""
        if self.signals is None or not len(self.archive):
            raise PlanError(UNFITTED)
        if self.signals.ranking != self.experience.ranking:
            raise PlanError(
                "The archive's plans were evaluated on another model, or with its units ranked by other scores (another scorer "
                "or calibration). Fit on this one, or take the policy's plan."
            )
        return self.signals

    def rewards(
        self, model: nn.Module, plans: Sequence[PruningPlan], evaluator: Evaluator
    ) -> list[Reward]:
        """What plans of this planner achieve on `evaluator`; compression counts what the fit rewarded, else parameters.

        Raises:
            PlanError: the planner has no signals, or a plan keeps other units than the ones its scores rank first.
            DataError: the evaluator returns something else than finite numbers.
        """
        if self.signals is None or model_digest(model, self.signals.groups) != self.signals.digest:
            raise PlanError(
                "The planner has no signals of this model; call plan(model) or fit(model, evaluator) first."
            )
        signals = self.signals
        counts = [tuple(plan.keep_counts.get(g.name, 0) for g in signals.groups) for plan in plans]
        for plan, keeps in zip(plans, counts, strict=True):
            if plan.groups != self._plan(signals, keeps, None).groups:
                raise PlanError(
                    "A plan keeps other units than this planner's scores rank first; evaluate it under masked()."
                )
        fitted = self.experience.cost if signals.ranking == self.experience.ranking else None
        cost = fitted or measure_cost(model, signals.groups, "parameters")
        with plan_rewards(model, evaluator, signals, cost) as measure_one:
            return [measure_one(keeps) for keeps in counts]

    def _plan(self, signals: Signals, keeps: Keeps, preference: Preference | None) -> PruningPlan:
        return plan_from_counts(
            signals.groups,
            keeps,
            signals.scores,
            scorer=signals.scorer,
            preference=preference.as_tuple() if preference else None,
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write preference, policy, signals and archive to the folder `path`, whole or not at all."""
        saved = Saved(
            preference=self.preference,
            pruning_ratio=self.pruning_ratio,
            bounds=self.bounds,
            scorer=self.scorer,
            mrs=self.mrs,
            policy=self.policy,
            signals=self.signals,
            experience=self.experience,
        )
        write_planner(path, saved, overwrite)

    @classmethod
    def load(
        cls, path: str | Path, *, scorer: Scorer | None = None, mrs: MRS | None = None
    ) -> "HiPPPlanner":
        """The planner that `save` wrote.

        Args:
            scorer, mrs: those that it was made with; needed only where they are not `hipp_ext.scorers` with default settings.

        Raises:
            CheckpointError: the folder is missing, incomplete or damaged.
            PlanError: a scorer has to be given, or another one is.
        """
        saved = read_planner(Path(path), scorer, mrs)
        planner = cls(
            saved.preference,
            pruning_ratio=saved.pruning_ratio,
            policy=saved.policy,
            scorer=saved.scorer,
            mrs=saved.mrs,
            bounds=saved.bounds,
        )
        planner.signals, planner.experience = saved.signals, saved.experience
        return planner
