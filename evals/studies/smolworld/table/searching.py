"""Plans that are searched: hipp's fit, TPE and CMA-ES, with equal evaluations and one start.

All of them search at one pruning_ratio, from the untrained planner's plan, on the same questions.
A plan is measured once: what was measured is kept, and an interrupted search asks for it again.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import torch

from hipp_ext.budget import Bounds
from hipp_ext.evals.studies.search.methods import cmaes, tpe
from hipp_ext.evals.studies.search.problem import Problem, run
from hipp_ext.evals.studies.smolworld.table.bench import Bench
from hipp_ext.evals.studies.smolworld.table.cells import CORNERS, Cell
from hipp_ext.evals.studies.smolworld.table.methods import CMAES, METHODS, TPE
from hipp_ext.evals.studies.smolworld.table.rewards import kept_rewards, read_rewards
from hipp_ext.evals.studies.smolworld.table.sizes import PLANS_PER_STEP
from hipp_ext.plan import PruningPlan
from hipp_ext.planner import FitSettings, HiPPPlanner, Signals
from hipp_ext.planner.archive import Archive
from hipp_ext.planner.evaluation import KeepCounts
from hipp_ext.planner.policy import new_policy
from hipp_ext.planner.reward import DEFAULT_ENDS, Reward, best_for
from hipp_ext.units import plan_from_counts


def searched_plan(bench: Bench, folder: Path, cell: Cell) -> PruningPlan:
    """The plan of a cell whose method searches; the search goes on in `folder`."""
    method = METHODS[cell.method]
    signals = bench.quick_signals
    if method.shuffled:
        signals = shuffled_signal(signals, cell.seed)
    place = search_place(folder, cell)
    preference = CORNERS[cell.corner]
    if method.search in ("policy", "best"):
        planner = _fitted(bench, place, signals, cell)
        return planner.plan(
            bench.quick, preference=preference, best_evaluated=method.search == "best"
        )
    evaluated = _searched(bench, place, signals, cell)
    rewards = [reward for _, reward in evaluated]
    best = evaluated[best_for(rewards, preference.as_tuple(), DEFAULT_ENDS)][0]
    return plan_from_counts(
        signals.groups,
        best,
        signals.scores,
        scorer=signals.scorer,
        preference=preference.as_tuple(),
    )


def evaluated_rewards(folder: Path, cell: Cell) -> list[Reward]:
    """What the search of a cell measured, in the order of its evaluations."""
    place = search_place(folder, cell)
    if METHODS[cell.method].search in ("policy", "best"):
        return [record.reward for record in Archive(place / "archive.jsonl").measured]
    return [reward for _, reward in read_rewards(place)]


def shuffled_signal(signals: Signals, seed: int) -> Signals:
    """The signals with the visual column shuffled among the groups of each place."""
    generator = torch.Generator().manual_seed(seed)
    visual = signals.visual.clone()
    for place in {g.place for g in signals.groups}:
        own = torch.tensor([i for i, g in enumerate(signals.groups) if g.place == place])
        visual[own] = visual[own[torch.randperm(len(own), generator=generator)]]
    # Another digest of the calibration: a fit of shuffled signals is another fit.
    columns = dict(signals.columns) | {"visual": visual}
    return dataclasses.replace(
        signals, columns=columns, calibration=f"{signals.calibration} shuffled {seed}"
    )


def start_logits(signals: Signals, ratio: float) -> np.ndarray:
    """Where searches start: allocation logits of the untrained planner's plan for the middle."""
    return signals.prior(torch.tensor([ratio]), torch.tensor([0.5]))[0].double().numpy()


def search_place(folder: Path, cell: Cell) -> Path:
    """The folder that the search of a cell is kept in."""
    return folder / f"{METHODS[cell.method].search_name}-{100 * cell.ratio:g}-{cell.seed}"


def _fitted(bench: Bench, place: Path, signals: Signals, cell: Cell) -> HiPPPlanner:
    """The planner after a fit of all preferences at once; one that was finished is only read."""
    planner = HiPPPlanner(
        CORNERS[cell.corner], pruning_ratio=cell.ratio, policy=new_policy(cell.seed), cache=None
    )
    planner.signals = signals
    settings = FitSettings(steps=bench.sizes.evaluations // PLANS_PER_STEP, seed=cell.seed)
    assert settings.preferences * settings.rollouts == PLANS_PER_STEP
    planner.fit(bench.quick, bench.search, settings, folder=place, log=bench.log)
    return planner


def _searched(
    bench: Bench, place: Path, signals: Signals, cell: Cell
) -> list[tuple[KeepCounts, Reward]]:
    """Every plan that TPE or CMA-ES evaluated, with its reward."""
    plans, title = bench.sizes.evaluations, f"{cell.method}, seed {cell.seed}: plans"
    with kept_rewards(bench, bench.search, signals, place, title=title, plans=plans) as reward:
        if len(evaluated := read_rewards(place)) >= plans:
            return evaluated
        problem = Problem(
            groups=signals.groups,
            bounds=Bounds(),
            evaluate=reward,
            evaluations=plans,
            pruning_ratio=cell.ratio,
            centre=functools.partial(start_logits, signals),
        )
        run({TPE: tpe, CMAES: cmaes}[cell.method], problem, cell.seed)
    return problem.evaluated
