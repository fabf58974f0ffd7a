"""The fit: propose plans, measure them, learn from them; resumable after every plan."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hipp_ext.budget import Bounds, Cost, keep_counts
from hipp_ext.errors import CheckpointError
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import seal, unseal
from hipp_ext.planner.archive import Archive, Record, fit_groups
from hipp_ext.planner.evaluation import KeepCounts, MeasureMany
from hipp_ext.planner.grpo import Rollouts
from hipp_ext.planner.policy import Policy
from hipp_ext.planner.reward import Reward
from hipp_ext.planner.search import PolicySearch
from hipp_ext.planner.settings import FitResult, FitSettings
from hipp_ext.planner.state import Signals
from hipp_ext.runs import RunFolder

ARCHIVE, CHECKPOINT = "archive.jsonl", "checkpoint.safetensors"


class Trainer:
    """Fits a policy to measured plans.

    Args:
        policy: policy to be trained.
        signals: signals of the model.
        measure: keep counts of several plans -> their rewards.
        settings: how many plans, and how they are drawn.
        cost: what compression counts.
        pruning_ratio: fixes the budget; None: the policy decides.
        bounds: bounds of the keep counts.
        run: folder of checkpoint and archive, from which the fit is resumed; None: none.
        at_once: number of plans that are measured at the same time.

    Raises:
        CheckpointError: the folder is damaged.
    """

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
        run: RunFolder | None = None,
        at_once: int = 1,
    ):
        self.signals, self.measure, self.settings = signals, measure, settings
        self.pruning_ratio, self.bounds, self.at_once = pruning_ratio, bounds or Bounds(), at_once
        self.search = PolicySearch(
            policy, signals, settings, cost=cost, pruning_ratio=pruning_ratio, bounds=self.bounds
        )
        self.folder = run
        self.archive = Archive(run / ARCHIVE if run else None)
        self.step, self.finished = 0, False
        if run:
            self._resume(run)
        # What was evaluated after the last checkpoint is not evaluated again, only replayed.
        later = self.archive.keep_steps_before(self.step)
        self._known: dict[KeepCounts, Reward] = {
            r.keep_counts: r.reward for r in (*self.archive.records, *later)
        }

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
            folder=self.folder.path if self.folder else None,
        )

    def run_step(self, tick: Callable[[], None] = lambda: None) -> None:
        """Propose plans, measure them, learn, write archive and checkpoint.

        `tick` is called after each plan.
        """
        # A generator per step: a resumed run draws what the uninterrupted one would have drawn.
        generator = self._generator()
        if not self.search.surrogate.fitted:  # in the first step of a run
            self.search.know(self.archive)
        self._evaluate(self.search.propose(self.archive, self.step, generator), tick)
        self.search.know(self.archive)
        self.search.learn(generator)
        self.step, self.finished = self.step + 1, False
        self._save()

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)

    @property
    def _per_step(self) -> int:
        """Number of plans of a step."""
        s = self.settings
        return s.preferences * s.rollouts * (s.budgets if self.pruning_ratio is None else 1)

    def _finish(self) -> None:
        """The final updates, on everything that is known."""
        if len(self.archive) and self.settings.final_update_fraction:
            self.search.know(self.archive)
            self.search.learn_anew(self.step, self._generator())
        self.finished = True
        self._save()

    def _evaluate(self, rollouts: Rollouts, tick: Callable[[], None]) -> None:
        """Measure the rollouts and append them to the archive, in their order."""
        asked = self._records(rollouts)
        done = 0
        while done < len(asked):
            self._measure_next([record["keep_counts"] for record in asked[done:]])
            while done < len(asked) and asked[done]["keep_counts"] in self._known:
                reward = self._known[asked[done]["keep_counts"]]
                self.archive.append([Record(**asked[done], reward=reward)])
                done += 1
                tick()

    def _records(self, rollouts: Rollouts) -> list[dict[str, Any]]:
        """The rollouts as records without their rewards."""
        _, m, n, _ = rollouts.allocations.shape
        records = []
        for index in range(math.prod(rollouts.allocations.shape[:3])):
            p, b, r = index // (m * n), index // n % m, index % n
            allocation = tuple(rollouts.allocations[p, b, r].tolist())
            # A fixed ratio as it was given, not in single precision.
            ratio = self.pruning_ratio
            ratio = float(rollouts.ratios[p, b]) if ratio is None else ratio
            counts = keep_counts(self.signals.groups, allocation, ratio, self.bounds)
            records.append(
                {
                    "step": self.step,
                    "index": index,
                    "preference": tuple(rollouts.preferences[p].tolist()),
                    "pruning_ratio": ratio,
                    "allocation": allocation,
                    "keep_counts": counts,
                }
            )
        return records

    def _measure_next(self, plans: Sequence[KeepCounts]) -> None:
        """Measure the next new plans, as many as there are processes."""
        new = [counts for counts in dict.fromkeys(plans) if counts not in self._known]
        if batch := new[: self.at_once]:
            self._known.update(zip(batch, self.measure(batch), strict=True))

    def _save(self) -> None:
        if self.folder:
            progress = {"step": self.step, "finished": self.finished}
            content = seal(self.search.learner.tensors(), progress)
            write_atomic(self.folder / CHECKPOINT, content)

    def _resume(self, run: RunFolder) -> None:
        """Continue where the folder's fit stopped."""
        if not fit_groups(self.archive.records, self.signals.groups):
            raise run.damaged("the archive holds plans of another model")
        if not (run / CHECKPOINT).exists():
            return
        try:
            tensors, progress = unseal(run / CHECKPOINT)
            self.step, self.finished = int(progress["step"]), bool(progress["finished"])
        except (CheckpointError, KeyError, ValueError, TypeError) as error:
            raise run.damaged(error) from None
        try:
            self.search.learner.restore(tensors)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise run.damaged(f"the checkpoint is of another policy: {error!r}") from None
        expected = self.step * self._per_step
        there = sum(r.step < self.step for r in self.archive.records)
        if there != expected:
            raise run.damaged(
                f"the archive holds {there} of the {expected} plans before step {self.step}"
            )
