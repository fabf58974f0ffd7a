"""The fit: propose plans, measure them, learn from them; again and again, resumable after every plan."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hipp_ext.budget import Bounds, keep_counts, largest_ratio
from hipp_ext.errors import PlanError
from hipp_ext.planner.archive import Archive, Record, fit_groups
from hipp_ext.planner.cost import Cost
from hipp_ext.planner.evaluation import Keeps, MeasureMany, plan_compression, plan_stability
from hipp_ext.planner.fit_folder import Checkpoint, FitFolder
from hipp_ext.planner.grpo import Learner, Measured, Rollouts, draw_preferences
from hipp_ext.planner.policy import MAX_RATIO, Policy
from hipp_ext.planner.proposals import Proposer
from hipp_ext.planner.reward import Reward, Scalarisation, check_scalarisation
from hipp_ext.planner.reward_model import RewardModel
from hipp_ext.planner.state import Signals, keep_shares
from hipp_ext.quantities import finite, whole

IMAGINED = (16, 2, 8)  # preferences, budgets and rollouts of an imagined batch
CAUTION = 2.0  # standard deviations taken off what the reward model promises, where the policy learns from it
FALLING = 0.4  # share of the final updates over which the learning rate falls
GRID = 16  # ratios at which the budget head looks for the best one


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How to fit; `evaluations` plans are evaluated in all, fewer where two rollouts round to the same plan.

    Where pruning_ratio is fixed there is one budget per preference, whatever `budgets` says, and so many plans less.

    Attributes:
        steps: rounds of proposing, measuring and learning.
        preferences: preferences per step, drawn over the whole simplex.
        budgets: budgets per preference.
        rollouts: allocations per preference and budget, at least 2.
        imagined: policy updates per step on rollouts that the reward model scores; 0: no reward model, GRPO on the measured
            rollouts alone.
        final: such updates when all plans are measured, by which the policy learns anew from where the fit began, at a learning
            rate that falls to nothing; as a share of all before them. 0: it stays as it is.
        candidates: plans among which the reward model chooses each measured rollout.
        learning_rate: of Adam.
        noise: standard deviation of the allocation logits at the first and at the last step.
        budget_noise: standard deviation of the budget logit.
        hindsight: regression updates on the archive per step, where `imagined` is 0.
        scalarisation: of the objectives, for budgets and for the choice of candidates.
        min_stability: plans that retain less synaptic flow (log, see `stability`) are not measured; None: all are.
        seed: of preferences and noise. The same seed and the same policy to begin with give the same archive.
    """

    steps: int = 20
    preferences: int = 2
    budgets: int = 3
    rollouts: int = 2
    imagined: int = 40
    final: float = 1.6
    candidates: int = 192
    learning_rate: float = 3e-3
    noise: tuple[float, float] = (0.7, 0.3)
    budget_noise: float = 0.5
    hindsight: int = 8
    scalarisation: Scalarisation = "tchebycheff"
    min_stability: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "preferences",
            "budgets",
            "rollouts",
            "imagined",
            "candidates",
            "hindsight",
            "seed",
        ):
            object.__setattr__(
                self, name, _checked(name, getattr(self, name), whole, "a whole number")
            )
        for name in ("final", "learning_rate", "budget_noise"):
            object.__setattr__(
                self, name, _checked(name, getattr(self, name), finite, "a finite number")
            )
        if self.min_stability is not None:
            object.__setattr__(
                self,
                "min_stability",
                _checked("min_stability", self.min_stability, finite, "a finite number"),
            )
        if self.steps < 0 or min(self.preferences, self.budgets) < 1 or self.rollouts < 2:
            raise ValueError(
                f"steps >= 0, preferences and budgets >= 1 and rollouts >= 2 are needed: {self}"
            )
        if min(self.imagined, self.final, self.hindsight) < 0 or self.candidates < max(
            8, self.rollouts
        ):
            raise ValueError(
                f"imagined, final and hindsight >= 0 and candidates >= 8 and >= rollouts are needed: {self}"
            )
        if not all(0 < x < math.inf for x in (*self.noise, self.budget_noise, self.learning_rate)):
            raise ValueError(f"noise, budget_noise and learning_rate above 0 are needed: {self}")
        check_scalarisation(self.scalarisation)

    @property
    def evaluations(self) -> int:
        """Plans evaluated by a full fit that decides on the budget."""
        return self.steps * self.preferences * self.budgets * self.rollouts


def _checked(name: str, value: Any, read: Callable[[Any], Any], needed: str) -> Any:
    """The value as a plain number: numpy's are no JSON, and 2.5 steps are none."""
    if (number := read(value)) is None:
        raise PlanError(f"FitSettings({name}={value!r}): {needed} is needed.")
    return number


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a fit did.

    Attributes:
        steps: rounds in all, those of earlier, interrupted runs included.
        evaluations: plans that were measured, each counted once.
        hypervolume: of the archive's front, see `archive.REFERENCE_POINT`.
        history: hypervolume after every step of this run.
        folder: where checkpoint and archive lie, or None.
    """

    steps: int
    evaluations: int
    hypervolume: float
    history: tuple[float, ...]
    folder: Path | None


class Trainer:
    """Fits a policy to what `measure` says of plans; resumes from `folder`."""

    def __init__(
        self,
        policy: Policy,
        signals: Signals,
        measure: MeasureMany,
        settings: FitSettings,
        *,
        cost: Cost,
        pruning_ratio: float | None = None,
        bounds: Bounds | None = None,
        folder: Path | None = None,
        dense: Mapping[str, float] | None = None,
        evaluator: str | None = None,
        mrs: str | None = None,
        at_once: int = 1,
    ):
        self.signals, self.measure, self.settings, self.cost = signals, measure, settings, cost
        self.pruning_ratio, self.bounds, self.at_once = pruning_ratio, bounds or Bounds(), at_once
        self.dense, self.evaluator, self.mrs = dict(dense or {}), evaluator, mrs
        self.limit = min(MAX_RATIO, largest_ratio(signals.groups, self.bounds))
        self.learner = Learner(policy, signals, settings.learning_rate, settings.scalarisation)
        self.model = RewardModel(signals.curvature)
        self.proposer = Proposer(
            groups=signals.groups,
            bounds=self.bounds,
            cost=cost,
            limit=self.limit,
            candidates=settings.candidates,
        )
        self.files = FitFolder(folder)
        self.archive = Archive(self.files.archive)
        self.step, self.finished = 0, False
        self._resume()
        self._known: dict[Keeps, Reward] = {r.keeps: r.reward for r in self.archive.records}
        # What was evaluated after the last checkpoint is not evaluated again, only replayed.
        later = self.archive.keep_steps_before(self.step)
        self._known.update({r.keeps: r.reward for r in later})
        self._gated = {r.keeps for r in (*self.archive.records, *later) if not r.measured}

    def run(self, progress: bool) -> FitResult:
        """All steps that are left, with a progress bar if wanted."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("plans"),
            TimeRemainingColumn(),
        ]
        steps, history = self.settings.steps, []
        with Progress(*columns, disable=not progress) as bar:
            task = bar.add_task(
                "fit", total=steps * self._per_step, completed=self.step * self._per_step
            )
            while self.step < steps:
                self.run_step(lambda: bar.advance(task))
                history.append(self.archive.hypervolume())
                bar.update(task, description=f"fit, hypervolume {history[-1]:.4f}")
            if not self.finished:
                bar.update(task, description="learning from all plans")
                self._finish()
        return FitResult(
            steps=self.step,
            evaluations=len(self.archive.measured),
            hypervolume=self.archive.hypervolume(),
            history=tuple(history),
            folder=self.files.path,
        )

    def run_step(self, tick: Callable[[], None] = lambda: None) -> None:
        """Propose plans, measure them, learn, write archive and checkpoint. `tick` is called per plan."""
        s = self.settings
        # A generator per step: a resumed run draws what the undisturbed one would have drawn.
        generator = torch.Generator().manual_seed(s.seed * 1_000_003 + self.step)
        if (
            not self.model.fitted
        ):  # in the first step after a start; later ones go on from what the last one learned
            self._know()
        rollouts = self._draw(generator)
        objectives = self._evaluate(rollouts, tick)
        self._learn(rollouts, objectives, generator)
        self.step, self.finished = self.step + 1, False
        self._save()

    @property
    def _per_step(self) -> int:
        """Plans of a step."""
        s = self.settings
        return s.preferences * s.rollouts * (s.budgets if self.pruning_ratio is None else 1)

    def _finish(self) -> None:
        """The final updates, on all that is known now."""
        if self._imagines and self.settings.final:
            self._know()
            self._learn_anew(
                torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)
            )
        self.finished = True
        self._save()

    def _draw(self, generator: torch.Generator) -> Rollouts:
        s, imagines = self.settings, self._imagines
        drawn = self.learner.draw(
            draw_preferences(s.preferences, generator),
            1 if self.pruning_ratio is not None else s.budgets,
            s.candidates // 2 if imagines else s.rollouts,
            noise=self._noise(),
            budget_noise=s.budget_noise,
            ratio=self.pruning_ratio,
            limit=self.limit,
            generator=generator,
        )
        if not imagines:
            return drawn
        return self.proposer.choose(
            drawn, s.rollouts, self.archive, self.model, self.learner, generator
        )

    @property
    def _imagines(self) -> bool:
        return self.settings.imagined > 0 and len(self.archive) > 0

    def _noise(self) -> float:
        first, last = self.settings.noise
        return first + (last - first) * self.step / max(self.settings.steps - 1, 1)

    # Measuring

    def _evaluate(self, rollouts: Rollouts, tick: Callable[[], None]) -> Float[Tensor, "P M N 3"]:
        shape = rollouts.allocations.shape[:3]
        wanted = []
        for index in range(math.prod(shape)):
            p, m, n = index // (shape[1] * shape[2]), index // shape[2] % shape[1], index % shape[2]
            allocation = rollouts.allocations[p, m, n].tolist()
            ratio = (
                float(rollouts.ratios[p, m]) if self.pruning_ratio is None else self.pruning_ratio
            )  # and not its float32
            keeps = keep_counts(self.signals.groups, allocation, ratio, self.bounds)
            wanted.append(
                (tuple(rollouts.preferences[p].tolist()), ratio, tuple(allocation), keeps)
            )
        records: list[Record] = []
        while len(records) < len(wanted):
            self._measure_next([keeps for *_, keeps in wanted[len(records) :]])
            while len(records) < len(wanted) and wanted[len(records)][3] in self._known:
                preference, ratio, allocation, keeps = wanted[len(records)]
                record = Record(
                    step=self.step,
                    index=len(records),
                    preference=preference,
                    pruning_ratio=ratio,
                    allocation=allocation,
                    keeps=keeps,
                    reward=self._known[keeps],
                    measured=keeps not in self._gated,
                )
                records.append(record)
                self.archive.append([record])
                tick()
        return torch.tensor([r.reward.objectives() for r in records]).view(*shape, 3)

    def _measure_next(self, plans: Sequence[Keeps]) -> None:
        """Measure the next new plans, as many as there are processes."""
        new = [keeps for keeps in dict.fromkeys(plans) if keeps not in self._known]
        batch: list[Keeps] = []
        for keeps in new:
            if len(batch) == self.at_once:
                break
            if not self._collapsed(keeps):
                batch.append(keeps)
        if batch:
            self._known.update(zip(batch, self.measure(batch), strict=True))

    def _collapsed(self, keeps: Keeps) -> bool:
        """Whether the gate closes; then the plan is recorded as guessing on both tasks, unmeasured."""
        if self.settings.min_stability is None:
            return False
        stability = plan_stability(self.signals, keeps)
        if stability >= self.settings.min_stability:
            return False
        compression = plan_compression(self.signals, self.cost, keeps)
        self._gated.add(keeps)
        self._known[keeps] = Reward(
            utility=0.0, robustness=0.0, compression=compression, stability=stability
        )
        return True

    # Learning

    def _measured(self) -> Measured:
        records = self.archive.records
        return Measured(
            ratios=torch.tensor([r.pruning_ratio for r in records]),
            allocations=torch.tensor([r.allocation for r in records]),
            objectives=torch.tensor([r.reward.objectives() for r in records]),
        )

    def _know(self) -> None:
        """Take in what was measured: what is at stake in each objective and, from it, how plans fare."""
        self.learner.ends = self.archive.nadir_and_ideal()
        if self._imagines:
            distinct = {r.keeps: r.reward for r in self.archive.records}
            rewards = torch.tensor([[r.utility, r.robustness] for r in distinct.values()])
            self.model.fit(keep_shares(self.signals.groups, list(distinct)), rewards)

    def _learn(self, rollouts: Rollouts, objectives: Tensor, generator: torch.Generator) -> None:
        s, free = self.settings, self.pruning_ratio is None
        self._know()
        if s.imagined:
            for update in range(s.imagined):
                self._learn_imagined(update, generator)
            return
        self.learner.learn(rollouts, objectives, budget=free)
        measured = self._measured()
        for _ in range(s.hindsight):
            self.learner.learn_in_hindsight(measured, generator)
            if free:
                preferences = draw_preferences(16, generator)
                ratios, known = (
                    measured.ratios.expand(16, -1),
                    measured.objectives.expand(16, -1, -1),
                )
                self.learner.learn_budgets(preferences, ratios, known)

    def _learn_anew(self, generator: torch.Generator) -> None:
        """From the beginning, on all that is known now.

        What a policy learned while little was known can have led it to where small steps do not lead back.
        """
        s = self.settings
        updates = round(s.final * s.imagined * self.step)
        self.learner.restart()
        for update in range(updates):
            self.learner.set_learning_rate(
                s.learning_rate * min(1.0, (updates - update) / (FALLING * updates))
            )
            self._learn_imagined(update, generator)

    def _learn_imagined(self, update: int, generator: torch.Generator) -> None:
        """At the budgets that the policy would choose and, every other time, at any: a user may fix the budget."""
        n, budgets, rollouts = IMAGINED
        preferences, ratio = draw_preferences(n, generator), self.pruning_ratio
        own = ratio is None and update % 2 == 0
        if ratio is None and not own:
            ratio = self.limit * torch.rand(n, budgets, generator=generator)
        imagined = self.learner.draw(
            preferences,
            budgets,
            rollouts,
            noise=self.settings.noise[1],
            budget_noise=1.0,
            ratio=ratio,
            limit=self.limit,
            generator=generator,
        )
        self.learner.learn(imagined, self._imagined_objectives(imagined), budget=own)
        if own:
            self._learn_budgets(preferences)

    def _imagined_objectives(self, rollouts: Rollouts) -> Float[Tensor, "P M N 3"]:
        shape = rollouts.allocations.shape
        ratios = rollouts.ratios[:, :, None].expand(shape[:3]).flatten()
        shares = self.proposer.shares(rollouts.allocations.reshape(-1, shape[3]), ratios)
        return self._expected(shares).view(*shape[:3], 3)

    def _expected(self, shares: Float[Tensor, "C G"]) -> Float[Tensor, "C 3"]:
        """Objectives by the reward model, less its doubt: a policy would find the plans that it is wrong about."""
        mean, deviation = self.model.predict(shares)
        return torch.cat(
            [mean - CAUTION * deviation, self.cost.removed(shares)[:, None].float()], 1
        )

    def _learn_budgets(self, preferences: Tensor) -> None:
        """The best of a grid of ratios, each with the allocation that the policy would choose there."""
        grid = (self.limit * torch.linspace(1 / 30, 1, GRID)).expand(len(preferences), -1)
        with torch.no_grad():
            means = self.learner.allocation_means(preferences, grid)
        shares = self.proposer.shares(means.flatten(0, 1), grid.flatten())
        self.learner.learn_budgets(preferences, grid, self._expected(shares).view(*grid.shape, 3))

    # Stopping and going on

    def _save(self) -> None:
        self.files.save(
            Checkpoint(step=self.step, finished=self.finished, tensors=self.learner.tensors())
        )

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed; more steps may be asked for later."""
        return {
            "settings": {
                k: v for k, v in dataclasses.asdict(self.settings).items() if k != "steps"
            },
            "pruning_ratio": self.pruning_ratio,
            "bounds": dataclasses.asdict(self.bounds),
            "cost": self.cost.kind,
            "mrs": self.mrs,
            "scorer": self.signals.scorer,
            "model": self.signals.digest,
            "calibration": self.signals.calibration,
            "evaluator": self.evaluator,
            "dense": self.dense,  # stands for the questions of an evaluator without a digest
        }

    def _resume(self) -> None:
        """Be where the folder's fit was when it stopped."""
        self.files.claim(self._identity())
        if not fit_groups(self.archive.records, self.signals.groups):
            raise self.files.damaged("The archive holds plans of another model.")
        if (checkpoint := self.files.load()) is None:
            return
        self.step, self.finished = checkpoint.step, checkpoint.finished
        try:
            self.learner.restore(checkpoint.tensors)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise self.files.damaged(f"The checkpoint is of another policy: {error!r}.") from None
        expected, there = (
            self.step * self._per_step,
            sum(r.step < self.step for r in self.archive.records),
        )
        if there != expected:
            raise self.files.damaged(
                f"The archive holds {there} of the {expected} plans before step {self.step}."
            )
