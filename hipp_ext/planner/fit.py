"""The fit: propose plans, measure them, learn from them; resumable after every plan.

It runs in one process or several, all of which get the result.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hipp_ext.budget import keep_counts
from hipp_ext.errors import CheckpointError
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import seal, unseal
from hipp_ext.planner.archive import Archive, Record, fit_groups
from hipp_ext.planner.evaluation import KeepCounts, MeasureMany, Workers, plan_rewards
from hipp_ext.planner.grpo import Rollouts
from hipp_ext.planner.history import FitHistory
from hipp_ext.planner.policy import Policy
from hipp_ext.planner.problem import FitProblem
from hipp_ext.planner.reward import Evaluator, Reward, scores_agree
from hipp_ext.planner.search import PolicySearch
from hipp_ext.planner.settings import FitResult
from hipp_ext.progress import progress_bar
from hipp_ext.runs import RunFolder

ARCHIVE, CHECKPOINT = "archive.jsonl", "checkpoint.safetensors"


class Trainer:
    """Fits a policy to measured plans.

    Args:
        policy: policy to be trained.
        problem: plans that are searched, and settings of the fit.
        measure: keep counts of several plans -> their rewards.
        run: folder of checkpoint and archive, from which the fit is resumed; None: none.
        at_once: number of plans that are measured at the same time.

    Raises:
        CheckpointError: the folder is damaged.
    """

    def __init__(
        self,
        policy: Policy,
        problem: FitProblem,
        measure: MeasureMany,
        run: RunFolder | None = None,
        at_once: int = 1,
    ):
        self.problem, self.measure, self.at_once = problem, measure, at_once
        self.search = PolicySearch(policy, problem)
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
        steps, history = self.problem.settings.steps, []
        total = steps * self.problem.plans_per_step
        with progress_bar(progress, "fit", total, len(self.archive)) as update:
            while self.step < steps:
                note = f"hypervolume {history[-1]:.4f}" if history else ""
                self.run_step(lambda: update(len(self.archive), note))  # noqa: B023
                history.append(self.archive.hypervolume())
            if not self.finished:
                update(len(self.archive), "learning from all plans")
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
        return torch.Generator().manual_seed(self.problem.settings.seed * 1_000_003 + self.step)

    def _finish(self) -> None:
        """The final updates, on everything that is known."""
        if len(self.archive) and self.problem.settings.final_update_fraction:
            self.search.know(self.archive)
            self.search.learn_anew(self.step, self._generator())
        self.finished = True
        self._save()

    def _evaluate(self, rollouts: Rollouts, tick: Callable[[], None]) -> None:
        """Measure the rollouts and append them to the archive, in their order."""
        asked = self._records(rollouts)
        for done, record in enumerate(asked):
            if record["keep_counts"] not in self._known:
                # Measure the next new plans, as many as there are processes.
                left = dict.fromkeys(r["keep_counts"] for r in asked[done:])
                new = [counts for counts in left if counts not in self._known][: self.at_once]
                self._known.update(zip(new, self.measure(new), strict=True))
            reward = self._known[record["keep_counts"]]
            self.archive.append([Record(**record, reward=reward)])
            tick()

    def _records(self, rollouts: Rollouts) -> list[dict[str, Any]]:
        """The rollouts as records without their rewards."""
        problem, records = self.problem, []
        places = itertools.product(*map(range, rollouts.allocations.shape[:3]))
        for index, (p, b, r) in enumerate(places):
            allocation = tuple(rollouts.allocations[p, b, r].tolist())
            # A fixed ratio as it was given, not in single precision.
            ratio = problem.pruning_ratio
            ratio = float(rollouts.ratios[p, b]) if ratio is None else ratio
            counts = keep_counts(problem.signals.groups, allocation, ratio, problem.bounds)
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

    def _save(self) -> None:
        if self.folder:
            progress = {"step": self.step, "finished": self.finished}
            content = seal(self.search.learner.tensors(), progress)
            write_atomic(self.folder / CHECKPOINT, content)

    def _resume(self, run: RunFolder) -> None:
        """Continue where the folder's fit stopped."""
        if not fit_groups(self.archive.records, self.problem.signals.groups):
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
        expected = self.step * self.problem.plans_per_step
        there = sum(r.step < self.step for r in self.archive.records)
        if there != expected:
            raise run.damaged(
                f"the archive holds {there} of the {expected} plans before step {self.step}"
            )


def run_fit(
    policy: Policy,
    model: nn.Module,
    evaluator: Evaluator,
    problem: FitProblem,
    workers: Workers,
    folder: Path | None,
    progress: bool,
) -> tuple[Policy, FitHistory, FitResult]:
    """(fitted policy, history, result), the same in all processes; `policy` is left as it was."""
    policy, digest = copy.deepcopy(policy), getattr(evaluator, "digest", None)
    signals, learned = problem.signals, None
    with plan_rewards(model, evaluator, signals, problem.cost) as measure_one:
        if not workers.leads:
            workers.serve(measure_one)
        else:
            with workers.leading(measure_one) as measure_many, contextlib.ExitStack() as stack:
                whole = measure_many([tuple(g.width for g in signals.groups)])[0]
                dense, run = {"utility": whole.utility, "robustness": whole.robustness}, None
                if folder:
                    identity = problem.identity(dense, digest)
                    run = stack.enter_context(
                        RunFolder(folder, identity, same={"dense": scores_agree})
                    )
                trainer = Trainer(policy, problem, measure_many, run, workers.count)
                result = trainer.run(progress)
                learned = (policy.state_dict(), trainer.archive.records, dense, result)
    state, records, dense, result = workers.share(learned)
    policy.load_state_dict(state)
    history = FitHistory(
        archive=Archive(records=records),
        ranking=signals.ranking,
        cost=problem.cost.name,
        dense=dense,
        evaluator=digest,
    )
    return policy, history, result
