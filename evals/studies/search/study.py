"""`hipp bench search`: which way of choosing plans is best, at equal evaluations, on the testbed's test split.

Every search, hipp among them, gets the same model, the same unit scores (WandaSP), the same evaluator (the search split) and
the same number of evaluations; what it chose is then measured on the test split. Beside that hipp knows the model's signals,
measured once on calibration data; informed searches know the sensitivity among them, of more rows and of both tasks together,
and search around what it says. Allocators see calibration data alone. A job is one method with one seed; finished jobs are kept
in the working folder, so an interrupted study goes on.
"""

import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
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
from hipp_ext.calibration import Batch, Task
from hipp_ext.errors import HippError
from hipp_ext.evals.evaluator import Evaluator
from hipp_ext.evals.pope import pope_scores
from hipp_ext.evals.studies.measuring import claim_folder
from hipp_ext.evals.studies.search.methods import METHODS
from hipp_ext.evals.studies.search.problem import Problem, run
from hipp_ext.files import write_atomic
from hipp_ext.planner import FitSettings, HiPPPlanner, Signals
from hipp_ext.planner.archive import REFERENCE_POINT
from hipp_ext.planner.cost import measure_cost
from hipp_ext.planner.evaluation import Keeps, plan_rewards
from hipp_ext.planner.policy import MAX_RATIO, Policy, new_policy
from hipp_ext.planner.reward import Reward
from hipp_ext.preference import Preference
from hipp_ext.sensitivity.measured import measure_sensitivity
from hipp_ext.surgery.slices import sliced

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
CORNERS = {"utility": Preference(1, 0, 0), "robustness": Preference(0, 1, 0)}
TOLERANCE = 0.003  # a searched plan may miss a table's ratio by this much
EDGE_RATIOS = (
    0.3,
    0.5,
    0.6,
)  # where utility is played against robustness; below, both tasks keep nearly all they had


@dataclass(frozen=True, kw_only=True)
class StudySize:
    """How much is measured.

    Attributes:
        seeds: of every search and of hipp.
        ablation_seeds: of hipp without its parts.
        evaluations: plans that a method may evaluate.
        questions: of POPE and of ScienceQA, of the search split. POPE asks some ten questions about one picture.
        front_plans: that a method may hand in for the test split's hypervolume; allocators, who answer any ratio, at as many.
        front_questions: per task, of the test split, for hypervolumes.
        sensitivity_rows: of calibration data, for allocators, informed searches and hipp untrained. Fits have the default.
        table_questions: of POPE and of ScienceQA, of the test split, for the tables and for how well preferences steer.
    """

    seeds: int = 5
    ablation_seeds: int = 0
    evaluations: int = 300
    questions: tuple[int, int] = (1024, 512)
    sensitivity_rows: int = 256
    front_plans: int = 60
    front_questions: int = 300
    table_questions: tuple[int, int] = (1200, 800)


class FlatPolicy(Policy):
    """Without hierarchy: the allocation head is not told the budget."""

    def allocation(self, signals: Signals, preferences: Any, ratios: Any) -> Any:
        """One allocation for all budgets."""
        return super().allocation(signals, preferences, torch.zeros_like(ratios))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way of running hipp: what differs from the default."""

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    signals: Callable[[Signals], Signals] = lambda signals: signals
    policy: Callable[[], Policy] = new_policy


def _blind(signals: Signals) -> Signals:
    return dataclasses.replace(signals, visual=torch.zeros_like(signals.visual))


def _flowless(signals: Signals) -> Signals:
    return dataclasses.replace(
        signals, flow_shares={n: torch.zeros_like(s) for n, s in signals.flow_shares.items()}
    )


def _flat_policy() -> Policy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FlatPolicy()


HIPP = "hipp"
VARIANTS: dict[str, Variant] = {
    HIPP: Variant(),
    "hipp, linear scalarisation": Variant(settings={"scalarisation": "linear"}),
    "hipp, no reward model": Variant(settings={"imagined": 0}),
    "hipp, no visual sensitivity": Variant(signals=_blind),
    "hipp, no SynFlow": Variant(signals=_flowless),
    "hipp, no hierarchy": Variant(policy=_flat_policy),
}
UNTRAINED = "hipp, untrained"
# Searches that start where the untrained planner is, instead of at uniform plans.
INFORMED = {f"{name}, from sensitivity": METHODS[name] for name in ("CMA-ES", "TPE")}
SEARCHES = METHODS | INFORMED


def all_jobs(size: StudySize) -> list[tuple[str, int]]:
    """(method, seed) of everything to run, what matters most first."""
    seeded = [(name, seed) for seed in range(size.seeds) for name in (HIPP, *SEARCHES)]
    ablations = [
        (name, seed) for seed in range(size.ablation_seeds) for name in VARIANTS if name != HIPP
    ]
    return [(name, 0) for name in (*ALLOCATORS, UNTRAINED)] + seeded + ablations


class Bench:
    """One process's model, questions and signals; `job` runs one method with one seed."""

    def __init__(self, size: StudySize):
        self.size = size
        self.model, self.processor = testbed.load()
        self.signals = HiPPPlanner(CORNERS["utility"]).measure(self.model, processor=self.processor)
        self.search = self._evaluator("search", size.questions)
        self.front_test = self._evaluator("test", (size.front_questions, size.front_questions))
        self.table_test = self._evaluator("test", size.table_questions)
        self.pope = testbed.questions("POPE", "test", size.table_questions[0])

    @functools.cached_property
    def tasks(self) -> dict[Task, list[Batch]]:
        """Calibration data of the allocators."""
        return testbed.calibration_tasks(self.processor, n=self.size.sensitivity_rows)

    @functools.cached_property
    def informed(self) -> Signals:
        """The signals, with sensitivity measured on the same data as the allocators'."""
        sensitivity = measure_sensitivity(
            self.model, self.tasks, self.signals.groups, self.signals.scores
        )
        return dataclasses.replace(self.signals, sensitivity=sensitivity)

    def _evaluator(self, split: str, counts: tuple[int, int]) -> Evaluator:
        pope, choice = (
            testbed.questions(task, split, n)
            for task, n in zip(("POPE", "ScienceQA"), counts, strict=True)
        )
        return Evaluator(self.model, self.processor, pope, choice)

    def job(self, name: str, seed: int) -> dict[str, Any]:
        """What the method chose, and what that achieves on the test split."""
        started = time.perf_counter()
        chosen = (
            self._allocator(name) if name in (*ALLOCATORS, UNTRAINED) else self._search(name, seed)
        )
        chosen["seconds"] = time.perf_counter() - started
        front = chosen.pop("front")
        on_test = _hypervolume(self._rewards(front, self.front_test))
        chosen["hypervolume"] = {"search": chosen.pop("search_hypervolume"), "test": on_test}
        chosen["table"] = {
            c: {r: self._row(k) for r, k in rows.items()}
            for c, rows in chosen.pop("answers").items()
        }
        if asked := chosen.pop("asked", {}):
            chosen["control"] = {who: self._control(*answers) for who, answers in asked.items()}
        return {"method": name, "seed": seed, **chosen}

    def _allocator(self, name: str) -> dict[str, Any]:
        groups = self.signals.groups
        if name == UNTRAINED:
            planner = self._planner(Variant(signals=lambda _: self.informed))
            choose = {
                corner: lambda ratio, c=corner: self._query(planner, CORNERS[c], ratio)
                for corner in CORNERS
            }
            asked = {"policy": self._asked(planner)}
        else:
            kind, scores = ALLOCATORS[name], self.signals.scores
            measured = kind(pruning_ratio=0.0).measure(self.model, groups, scores, self.tasks)
            choose = {
                corner: lambda ratio: kind(pruning_ratio=ratio).keep_counts(
                    groups, scores, measured
                )
                for corner in CORNERS
            }
            asked = {}
        n = self.size.front_plans
        ratios = (MAX_RATIO * (i + 1) / n for i in range(n))
        front = [
            choose[corner](ratio)
            for corner, ratio in zip(itertools.cycle(CORNERS), ratios, strict=False)
        ]
        return {
            "evaluations": 0,
            "front": _distinct(front),
            "search_hypervolume": None,
            "asked": asked,
            "answers": {corner: {str(r): choose[corner](r) for r in RATIOS} for corner in CORNERS},
        }

    def _search(self, name: str, seed: int) -> dict[str, Any]:
        if name in VARIANTS:
            return self._hipp(VARIANTS[name], seed)
        cost = measure_cost(self.model, self.signals.groups, "parameters")
        with plan_rewards(self.model, self.search, self.signals, cost) as measure:
            problem = Problem(
                groups=self.signals.groups,
                bounds=Bounds(),
                evaluate=measure,
                evaluations=self.size.evaluations,
                centre=self._sensitivity_says if name in INFORMED else None,
            )
            run(SEARCHES[name], problem, seed)
        return self._searched(problem.evaluated)

    def _sensitivity_says(self, ratio: float) -> np.ndarray:
        return self.informed.prior(torch.tensor([ratio]), torch.tensor([0.5]))[0].double().numpy()

    def _searched(self, evaluated: Sequence[tuple[Keeps, Reward]]) -> dict[str, Any]:
        answers: dict[str, dict[str, Keeps]] = {corner: {} for corner in CORNERS}
        for corner, rows in answers.items():
            for ratio in RATIOS:
                enough = [(k, r) for k, r in evaluated if r.compression >= ratio - TOLERANCE]
                if enough:
                    rows[str(ratio)] = max(enough, key=lambda e: getattr(e[1], corner))[0]
        rewards = [reward for _, reward in evaluated]
        return {
            "evaluations": len(evaluated),
            "answers": answers,
            "front": _hand_in(evaluated, self.size.front_plans),
            "search_hypervolume": _hypervolume(rewards),
        }

    def _planner(self, variant: Variant) -> HiPPPlanner:
        planner = HiPPPlanner(CORNERS["utility"], policy=variant.policy())
        planner.signals = variant.signals(self.signals)
        return planner

    def _hipp(self, variant: Variant, seed: int) -> dict[str, Any]:
        base = FitSettings()
        per_step = base.preferences * base.budgets * base.rollouts
        settings = FitSettings(
            steps=self.size.evaluations // per_step, seed=seed, **variant.settings
        )
        planner = self._planner(variant)
        planner.fit(self.model, self.search, settings, progress=False)
        found = self._searched(list({r.keeps: r.reward for r in planner.archive.records}.items()))
        found["answers"] = {
            c: {str(r): self._query(planner, CORNERS[c], r) for r in RATIOS} for c in CORNERS
        }
        if variant is VARIANTS[HIPP]:
            archived = [
                (w, self._query(planner, Preference(*w), None, archived=True)) for w in _lattice(10)
            ]
            found["asked"] = {"policy": self._asked(planner), "archived": (archived, {})}
        return found

    def _asked(
        self, planner: HiPPPlanner
    ) -> tuple[Sequence[tuple], Mapping[float, Sequence[tuple]]]:
        """The policy's answers over the simplex, and from robustness to utility at fixed budgets."""
        edges = {
            r: [(i / 10, self._query(planner, Preference(i, 10 - i, 0), r)) for i in range(11)]
            for r in EDGE_RATIOS
        }
        return [(w, self._query(planner, Preference(*w), None)) for w in _lattice(10)], edges

    def _query(
        self,
        planner: HiPPPlanner,
        preference: Preference,
        ratio: float | None,
        *,
        archived: bool = False,
    ) -> Keeps:
        planner.pruning_ratio = ratio
        return tuple(
            g.keep
            for g in planner.plan(self.model, preference=preference, archived=archived).groups
        )

    # On the test split

    def _rewards(self, plans: Sequence[Keeps], evaluator: Evaluator) -> list[Reward]:
        cost = measure_cost(self.model, self.signals.groups, "parameters")
        with plan_rewards(self.model, evaluator, self.signals, cost) as measure:
            return [measure(keeps) for keeps in plans]

    def _row(self, keeps: Keeps) -> dict[str, Any]:
        """POPE F1 and ScienceQA accuracy [%] of a plan, and its answers to either, a letter each."""
        with sliced(self.model, self.signals.groups, self.signals.scores) as shrink:
            shrink(keeps)
            scores = self.table_test.scores(self.model)
        truth, kinds = [q.answer for q in self.pope], [q.category for q in self.pope]
        pope = pope_scores(
            scores["pope"].answers, truth, kinds, [q.picture or "" for q in self.pope]
        )["vlmeval"]["overall"]
        answers = {
            task: "".join(a[0] for a in scores[s].answers)
            for task, s in (("POPE", "pope"), ("ScienceQA", "choice"))
        }
        return {
            "F1": pope.f1,
            "POPE": pope.accuracy,
            "ScienceQA": scores["choice"].accuracy,
            "answers": answers,
        }

    def _control(
        self, lattice: Sequence[tuple], edges: Mapping[float, Sequence[tuple]]
    ) -> dict[str, Any]:
        """How well the preference steers: objectives over the lattice and along edges, and the swing from corner to corner."""
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


def _lattice(n: int) -> list[tuple[float, float, float]]:
    return [(i / n, j / n, (n - i - j) / n) for i in range(n + 1) for j in range(n + 1 - i)]


def _distinct(plans: Sequence[Keeps]) -> list[Keeps]:
    return list(dict.fromkeys(plans))


def _hypervolume(rewards: Sequence[Reward]) -> float:
    points = np.array([r.objectives() for r in rewards])
    return float(moocore.hypervolume(points, ref=list(REFERENCE_POINT), maximise=True))


def _hand_in(evaluated: Sequence[tuple[Keeps, Reward]], n: int) -> list[Keeps]:
    """The `n` plans that together have the largest hypervolume on the search split, chosen greedily."""
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


_bench: Bench | None = None


def _start(size: StudySize) -> None:
    global _bench
    torch.set_num_threads(1)
    _bench = Bench(size)


def _work(job: tuple[str, int, str]) -> tuple[str, int]:
    name, seed, path = job
    assert _bench is not None
    write_atomic(Path(path), json.dumps(_bench.job(name, seed)))
    return name, seed


def run_study(
    size: StudySize,
    folder: Path,
    wanted: Sequence[tuple[str, int]],
    *,
    processes: int | None = None,
) -> list[dict[str, Any]]:
    """Run those of the `wanted` jobs that `folder` lacks, in several processes of one thread each; returns all their results.

    Raises:
        OutputExistsError: the folder holds a study of another size.
        HippError: a process died; what was finished is kept.
    """
    from rich.progress import Progress

    claim_folder(folder, dataclasses.asdict(size))
    paths = {
        (name, seed): folder / f"{name.replace(' ', '_').replace(',', '')}-{seed}.json"
        for name, seed in wanted
    }
    missing = [(name, seed, str(path)) for (name, seed), path in paths.items() if not path.exists()]
    if missing:
        processes = min(processes or os.cpu_count() or 1, len(missing))
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start, (size,))
        try:
            with Progress() as bar:
                task = bar.add_task("jobs", total=len(missing))
                for done in as_completed([pool.submit(_work, job) for job in missing]):
                    name, seed = done.result()
                    bar.update(task, advance=1, description=f"{name}, seed {seed}")
        except BrokenProcessPool as error:
            raise HippError(
                f"A process of the study died, killed for its memory perhaps. Finished jobs are kept in {folder}: "
                "the same command goes on from there."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    return [json.loads(path.read_text()) for path in paths.values()]
