"""The jobs of the search study: one method with one seed chooses plans, the test split judges them.

Every search, hipp among them, gets the same model, the same unit scores (WandaSP), the same
evaluator (the search split) and the same number of evaluations. hipp also knows the model's
signals, measured once on calibration data. Informed searches know the sensitivity among them, on
more rows and for both tasks together, and search around the plans that it suggests. Allocators see
calibration data alone. Finished jobs are kept in the working folder, so an interrupted study
continues.
"""

import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import torch

from hipp_ext import testbed
from hipp_ext.allocators import ALLOCATORS
from hipp_ext.budget import Bounds
from hipp_ext.calibration import Calibration
from hipp_ext.errors import HippError
from hipp_ext.evals.evaluator import Evaluator
from hipp_ext.evals.studies.measuring import pope_by_split
from hipp_ext.evals.studies.search.methods import METHODS
from hipp_ext.evals.studies.search.problem import Problem, run
from hipp_ext.files import write_atomic
from hipp_ext.planner import FitSettings, HiPPPlanner, Signals
from hipp_ext.planner.archive import REFERENCE_POINT
from hipp_ext.planner.cost import cost_of
from hipp_ext.planner.evaluation import KeepCounts, plan_rewards
from hipp_ext.planner.policy import MAX_RATIO, new_policy
from hipp_ext.planner.reward import Reward
from hipp_ext.preference import Preference
from hipp_ext.runs import RunFolder
from hipp_ext.sensitivity.efforts import measure_sensitivity
from hipp_ext.surgery.slices import sliced

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
CORNERS = {"utility": Preference(1, 0, 0), "robustness": Preference(0, 1, 0)}
TOLERANCE = 0.003  # a searched plan may miss a table's ratio by this much
# Budgets of the utility-robustness edge; below 0.3 both tasks keep nearly all of their accuracy.
EDGE_RATIOS = (0.3, 0.5, 0.6)
LATTICE_STEPS = 10  # preferences are queried on a lattice over the simplex with this many steps


@dataclass(frozen=True, kw_only=True)
class StudySize:
    """How much is measured.

    Attributes:
        seeds: number of runs of every search and of hipp.
        evaluations: number of plans that a method may evaluate.
        questions: numbers of POPE and ScienceQA questions of the search split. POPE asks some ten
            questions about one picture.
        front_plans: number of plans that a method may submit for its hypervolume. Allocators answer
            any ratio, and are asked at as many ratios.
        front_questions: number of questions per task of the test split, for hypervolumes.
        sensitivity_rows: number of calibration rows of allocators, informed searches and the
            untrained planner. Fits use the default.
        table_questions: numbers of POPE and ScienceQA questions of the test split, for the tables
            and for how well preferences steer.
    """

    seeds: int = 5
    evaluations: int = 300
    questions: tuple[int, int] = (1024, 512)
    sensitivity_rows: int = 256
    front_plans: int = 60
    front_questions: int = 300
    table_questions: tuple[int, int] = (1200, 800)


HIPP = "hipp"
UNTRAINED = "hipp, untrained"
# Searches that start from the untrained planner's plans instead of uniform plans.
INFORMED = {f"{name}, from sensitivity": METHODS[name] for name in ("CMA-ES", "TPE")}
SEARCHES = METHODS | INFORMED


def all_jobs(size: StudySize) -> list[tuple[str, int]]:
    """(method, seed) of all jobs."""
    seeded = [(name, seed) for seed in range(size.seeds) for name in (HIPP, *SEARCHES)]
    return [(name, 0) for name in (*ALLOCATORS, UNTRAINED)] + seeded


class Contest:
    """The model, questions and signals of one process; `job` runs one method with one seed."""

    def __init__(self, size: StudySize):
        self.size = size
        self.model, self.processor = testbed.load()
        self.signals = HiPPPlanner(CORNERS["utility"]).measure(self.model, processor=self.processor)
        self.search = self._evaluator("search", size.questions)
        self.front_test = self._evaluator("test", (size.front_questions, size.front_questions))
        self.table_test = self._evaluator("test", size.table_questions)
        self.pope = testbed.questions("POPE", "test", size.table_questions[0])

    @functools.cached_property
    def calibration(self) -> Calibration:
        """Calibration data of the allocators."""
        return Calibration.testbed(self.model, self.processor, rows=self.size.sensitivity_rows)

    @functools.cached_property
    def informed(self) -> Signals:
        """The signals, with sensitivity measured on the same data as the allocators'."""
        sensitivity = measure_sensitivity(
            self.model, self.calibration, self.signals.groups, self.signals.scores
        )
        return dataclasses.replace(self.signals, sensitivity=sensitivity)

    def _evaluator(self, split: str, counts: tuple[int, int]) -> Evaluator:
        tasks = map(testbed.questions, testbed.TASKS, (split, split), counts)
        return Evaluator(self.model, self.processor, *tasks)

    def job(self, name: str, seed: int) -> dict[str, Any]:
        """The plans that the method chose, and their figures on the test split."""
        started = time.perf_counter()
        fixed = name in (*ALLOCATORS, UNTRAINED)
        chosen = self._allocator(name) if fixed else self._search(name, seed)
        chosen["seconds"] = time.perf_counter() - started
        front = chosen.pop("front")
        on_test = _hypervolume(self._rewards(front, self.front_test))
        chosen["hypervolume"] = {"search": chosen.pop("search_hypervolume"), "test": on_test}
        answers = chosen.pop("answers")
        plans = _distinct([k for column in answers.values() for k in column.values()])
        rows = dict(zip(plans, map(self._row, plans), strict=True))
        chosen["table"] = {
            c: {r: rows[k] for r, k in column.items()} for c, column in answers.items()
        }
        if asked := chosen.pop("asked", {}):
            chosen["control"] = {who: self._control(*answers) for who, answers in asked.items()}
        return {"method": name, "seed": seed, **chosen}

    def _allocator(self, name: str) -> dict[str, Any]:
        groups, scores, asked = self.signals.groups, self.signals.scores, {}
        if name == UNTRAINED:
            planner = self._planner(self.informed)
            choose = functools.partial(self._query, planner)
            asked = {"policy": self._asked(planner)}
        else:
            kind = ALLOCATORS[name]
            measured = kind(pruning_ratio=0.0).measure(self.model, groups, scores, self.calibration)

            def choose(preference: Preference, ratio: float) -> KeepCounts:
                return kind(pruning_ratio=ratio).keep_counts(groups, scores, measured)

        n = self.size.front_plans
        ratios = (MAX_RATIO * (i + 1) / n for i in range(n))
        corners = itertools.cycle(CORNERS.values())
        return {
            "evaluations": 0,
            "front": _distinct([choose(c, r) for c, r in zip(corners, ratios, strict=False)]),
            "search_hypervolume": None,
            "asked": asked,
            "answers": {n: {str(r): choose(c, r) for r in RATIOS} for n, c in CORNERS.items()},
        }

    def _search(self, name: str, seed: int) -> dict[str, Any]:
        if name == HIPP:
            return self._hipp(seed)
        cost = cost_of(self.signals.groups, "parameters")
        with plan_rewards(self.model, self.search, self.signals, cost) as measure:
            problem = Problem(
                groups=self.signals.groups,
                bounds=Bounds(),
                evaluate=measure,
                evaluations=self.size.evaluations,
                centre=self._prior if name in INFORMED else None,
            )
            run(SEARCHES[name], problem, seed)
        return self._searched(problem.evaluated)

    def _prior(self, ratio: float) -> np.ndarray:
        return self.informed.prior(torch.tensor([ratio]), torch.tensor([0.5]))[0].double().numpy()

    def _searched(self, evaluated: Sequence[tuple[KeepCounts, Reward]]) -> dict[str, Any]:
        answers: dict[str, dict[str, KeepCounts]] = {corner: {} for corner in CORNERS}
        for corner, rows in answers.items():
            for ratio in RATIOS:
                enough = [(k, r) for k, r in evaluated if r.compression >= ratio - TOLERANCE]
                if enough:
                    rows[str(ratio)] = max(enough, key=lambda e: getattr(e[1], corner))[0]
        rewards = [reward for _, reward in evaluated]
        return {
            "evaluations": len(evaluated),
            "answers": answers,
            "front": _best_front(evaluated, self.size.front_plans),
            "search_hypervolume": _hypervolume(rewards),
        }

    def _planner(self, signals: Signals) -> HiPPPlanner:
        planner = HiPPPlanner(CORNERS["utility"], policy=new_policy())
        planner.signals = signals
        return planner

    def _hipp(self, seed: int) -> dict[str, Any]:
        base = FitSettings()
        per_step = base.preferences * base.budgets * base.rollouts
        settings = FitSettings(steps=self.size.evaluations // per_step, seed=seed)
        planner = self._planner(self.signals)
        planner.fit(self.model, self.search, settings, progress=False)
        found = self._searched(
            list({r.keep_counts: r.reward for r in planner.archive.records}.items())
        )
        found["answers"] = {
            n: {str(r): self._query(planner, c, r) for r in RATIOS} for n, c in CORNERS.items()
        }
        archived = [
            (w, self._query(planner, Preference(*w), None, best_evaluated=True)) for w in _lattice()
        ]
        found["asked"] = {"policy": self._asked(planner), "archived": (archived, {})}
        return found

    def _asked(
        self, planner: HiPPPlanner
    ) -> tuple[Sequence[tuple], Mapping[float, Sequence[tuple]]]:
        """The policy's answers over the simplex, and along the utility edge at fixed budgets."""
        n = LATTICE_STEPS
        edges = {
            r: [(i / n, self._query(planner, Preference(i, n - i, 0), r)) for i in range(n + 1)]
            for r in EDGE_RATIOS
        }
        return [(w, self._query(planner, Preference(*w), None)) for w in _lattice()], edges

    def _query(
        self,
        planner: HiPPPlanner,
        preference: Preference,
        ratio: float | None,
        *,
        best_evaluated: bool = False,
    ) -> KeepCounts:
        planner.pruning_ratio = ratio
        plan = planner.plan(self.model, preference=preference, best_evaluated=best_evaluated)
        return tuple(g.keep for g in plan.groups)

    # On the test split

    def _rewards(self, plans: Sequence[KeepCounts], evaluator: Evaluator) -> list[Reward]:
        cost = cost_of(self.signals.groups, "parameters")
        with plan_rewards(self.model, evaluator, self.signals, cost) as measure:
            return [measure(keeps) for keeps in plans]

    def _row(self, keeps: KeepCounts) -> dict[str, Any]:
        """POPE F1 and ScienceQA accuracy of a plan [%], and its answers, one letter each."""
        with sliced(self.model, self.signals.groups, self.signals.scores) as shrink:
            shrink(keeps)
            scores = self.table_test.scores(self.model)
        pope = pope_by_split(scores, self.pope)["overall"]
        answers = {
            task: "".join(a[0] for a in scores[s].answers)
            for task, s in zip(testbed.TASKS, ("pope", "choice"), strict=True)
        }
        choice = scores["choice"].accuracy
        return {"F1": pope.f1, "POPE": pope.accuracy, "ScienceQA": choice, "answers": answers}

    def _control(
        self, lattice: Sequence[tuple], edges: Mapping[float, Sequence[tuple]]
    ) -> dict[str, Any]:
        """Objectives over the lattice and along edges, and the difference between the corners."""
        plans = _distinct([k for _, k in itertools.chain(lattice, *edges.values())])
        # Steps along an edge are small: with fewer questions their order is noise.
        rewards = dict(zip(plans, self._rewards(plans, self.table_test), strict=True))
        reached: dict[str, Any] = {
            "lattice": [(w, rewards[k].objectives()) for w, k in lattice],
            "edges": {},
            "swings": {},
        }
        for ratio, edge in edges.items():
            robust, useful = self._row(edge[0][1]), self._row(edge[-1][1])
            reached["edges"][str(ratio)] = [(w, rewards[k].objectives()) for w, k in edge]
            reached["swings"][str(ratio)] = {m: useful[m] - robust[m] for m in ("F1", "ScienceQA")}
        return reached


def _lattice() -> list[tuple[float, float, float]]:
    n = LATTICE_STEPS
    return [(i / n, j / n, (n - i - j) / n) for i in range(n + 1) for j in range(n + 1 - i)]


def _distinct(plans: Sequence[KeepCounts]) -> list[KeepCounts]:
    return list(dict.fromkeys(plans))


def _hypervolume(rewards: Sequence[Reward]) -> float:
    points = np.array([r.objectives() for r in rewards])
    return float(moocore.hypervolume(points, ref=list(REFERENCE_POINT), maximise=True))


def _best_front(evaluated: Sequence[tuple[KeepCounts, Reward]], n: int) -> list[KeepCounts]:
    """The `n` plans with the largest joint hypervolume on the search split, chosen greedily."""
    points = np.array([r.objectives() for _, r in evaluated])
    left = np.flatnonzero(moocore.is_nondominated(points, maximise=True)).tolist()
    chosen: list[int] = []
    while left and len(chosen) < n:
        gains = [
            moocore.hypervolume(points[[*chosen, i]], ref=list(REFERENCE_POINT), maximise=True)
            for i in left
        ]
        chosen.append(left.pop(int(np.argmax(gains))))
    return [evaluated[i][0] for i in chosen]


_contest = functools.lru_cache(maxsize=1)(Contest)


def _work(size: StudySize, name: str, seed: int, path: Path) -> tuple[str, int]:
    torch.set_num_threads(1)
    write_atomic(path, json.dumps(_contest(size).job(name, seed)))
    return name, seed


def run_study(
    size: StudySize, folder: Path, jobs: Sequence[tuple[str, int]], *, processes: int | None = None
) -> list[dict[str, Any]]:
    """The results of `jobs`; those that `folder` lacks are run in processes of one thread each.

    A single process is this one.

    Raises:
        CheckpointError: the folder holds a study of another size.
        HippError: a process died; finished jobs are kept.
    """
    from rich.progress import Progress

    all_paths = [
        (name, seed, folder / f"{name.replace(' ', '_').replace(',', '')}-{seed}.json")
        for name, seed in jobs
    ]
    with RunFolder(folder, dataclasses.asdict(size)), Progress() as bar:
        missing = [job for job in all_paths if not job[2].exists()]
        processes = min(processes or os.cpu_count() or 1, len(missing))
        task = bar.add_task("jobs", total=len(missing))
        for name, seed in _finished(size, missing, processes, folder):
            bar.update(task, advance=1, description=f"{name}, seed {seed}")
    return [json.loads(path.read_text()) for _, _, path in all_paths]


def _finished(
    size: StudySize, jobs: Sequence[tuple[str, int, Path]], processes: int, folder: Path
) -> Iterator[tuple[str, int]]:
    """(method, seed) of each of the `jobs`, as soon as it is finished."""
    if processes <= 1:
        yield from (_work(size, *job) for job in jobs)
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    try:
        for done in as_completed([pool.submit(_work, size, *job) for job in jobs]):
            yield done.result()
    except BrokenProcessPool as error:
        raise HippError(
            "A process of the study died, perhaps for lack of memory. Finished jobs are kept "
            f"in {folder}: the same command continues from there."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
