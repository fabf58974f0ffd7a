"""Search methods: each takes a `Problem` and a seed, and spends the problem's evaluations.

All meet budgets by the same code. All but random search start from the problem's centre (uniform
plans by default). All draw from generators of their own: a seed gives the same plans, and the
global random states do not change.

The defaults are the best settings found for 300 evaluations of the testbed's 12 groups. Candidates
were screened with a regression on about a thousand evaluated plans, and the best of each method was
run once (48 questions per task of the search split, seed 0). Hypervolume there, customary setting
-> default: EvoPress 0.400 -> 0.408 (budgets up to 0.6, larger switches), NSGA-II 0.392 -> 0.404,
CMA-ES 0.410 -> 0.458 (12 budgets instead of 5), TPE 0.430 -> 0.434 (one variable at a time, wider
box); random search 0.361. One seed each: differences of 0.01 mean little.
"""

import importlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hipp_ext.allocators.levels import Levels
from hipp_ext.errors import MissingExtraError
from hipp_ext.evals.studies.search.problem import Keeps, Method, Problem
from hipp_ext.planner.reward import Reward

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
FINE_RATIOS = tuple(round(0.05 * i, 2) for i in range(1, 13))
WEIGHTS = (0.5, 0.8, 0.2)  # weights of utility; robustness gets the rest
# Half-width of the box that NSGA-II and TPE need; sigmoid(-4) is below the usual floors.
LOGIT_RANGE = 4.0
OFFSPRING = 4  # plans per generation of EvoPress
SWITCH_SIZES = (1 / 4, 1 / 2)  # of EvoPress, in parameters of an average group; drawn evenly
FIRST_PLANS = 8
UNLIMITED = 10**9


def random_search(problem: Problem, seed: int) -> None:
    """Allocation logits from N(0, 1), the pruning_ratio uniform in [0, largest_ratio]."""
    rng = np.random.default_rng(seed)
    while True:
        problem(
            problem.decode(rng.standard_normal(len(problem.groups)), rng.uniform(0, problem.limit))
        )


def evopress(problem: Problem, seed: int, *, ratios: Sequence[float] = RATIOS) -> None:
    """(1 + lambda) evolution by level switches at fixed budgets, from the problem's centre.

    The budgets take turns, a generation of OFFSPRING plans each. The fitness changes over WEIGHTS
    from round to round; the parent is the best plan of its budget so far for the weight of the
    round.

    Args:
        problem: the problem.
        seed: random seed.
        ratios: budgets, as pruning ratios.

    Source: EvoPress (arXiv 2410.14649), algorithm 1.
    Differs from the paper: several budgets share the evaluations. Fitness is the weighted reward,
    not the KL to dense. Every offspring is evaluated in full, without multi-stage selection,
    because a plan costs the same for all methods. A level is a keep count, so a switch moves as
    many parameters as fit instead of one level for another.
    """
    rng = np.random.default_rng(seed)
    budgets = _within(problem, ratios)
    pools: dict[float, dict[Keeps, Reward]] = {ratio: {} for ratio in budgets}
    for ratio, pool in pools.items():
        start = problem.decode(np.zeros(len(problem.groups)), ratio)
        pool[start] = problem(start)
    for weight in itertools.cycle(WEIGHTS):
        for ratio, pool in pools.items():
            parent = max(pool, key=lambda plan: _fitness(pool[plan], weight))  # noqa: B023 (called at once)
            budget = problem.levels.budget(ratio)
            for _ in range(OFFSPRING):
                child = _new_child(problem.levels, parent, pool, budget, rng)
                pool[child] = problem(child)


def _new_child(levels: Levels, parent: Keeps, pool: dict, budget: int, rng: Any) -> Keeps:
    """A mutant of `parent`, not in `pool` unless many attempts found none."""
    child = parent
    for attempt in range(60):
        child = parent
        # The smaller of two draws: mostly one switch; more where few new plans are left.
        for _ in range(min(rng.integers(1, 4, 2)) + attempt // 10):
            child = _switch(levels, child, budget, float(rng.choice(SWITCH_SIZES)), rng)
        if child not in pool:
            break
    return child


def _switch(levels: Levels, keeps: Keeps, budget: int, size: float, rng: Any) -> Keeps:
    """`keeps` after one group has given parameters to another; the budget is still met."""
    givers = [g for g, k in enumerate(keeps) if k > levels.counts[g][0]]
    takers = [g for g, k in enumerate(keeps) if k < levels.counts[g][-1]]
    if not givers or not takers:
        return keeps
    giver, taker, changed = int(rng.choice(givers)), int(rng.choice(takers)), list(keeps)
    climb = (
        int(levels.counts[taker][levels.level_of(taker, keeps[taker]) + 1] - keeps[taker])
        * levels.costs[taker]
    )
    units = max(
        1,
        round(size * levels.total / len(keeps) / levels.costs[giver]),
        math.ceil(climb / levels.costs[giver]),
    )
    changed[giver] = int(levels.counts[giver][levels.level_of(giver, keeps[giver] - units)])
    # Parameters that the taker cannot use go to the others, in random order, then to the giver.
    worth = rng.random(len(keeps))
    worth[[taker, giver]] = 2.0, -1.0
    return levels.fill(
        changed, budget, [np.full(len(c), w) for c, w in zip(levels.counts, worth, strict=True)]
    )


def nsga2(problem: Problem, seed: int) -> None:
    """NSGA-II on allocation logits and pruning_ratio, all three objectives at once.

    FIRST_PLANS individuals of the first generation are the centre at a spread of ratios; the others
    are drawn evenly.

    Source: NSGA-II (Deb et al., IEEE TEC 6(2), 2002), by the library pymoo.
    Differs from the paper: a dozen generations instead of hundreds, therefore larger steps
    (customary are eta 15 to 20 and a rate of one over the number of variables).
    """
    algorithms, core = _host("pymoo.algorithms.moo.nsga2"), _host("pymoo.core.problem")
    crossover = _host("pymoo.operators.crossover.sbx")
    mutation = _host("pymoo.operators.mutation.pm")
    population, eta = 24, 3.0  # eta: higher = children nearer to parents
    logits = len(problem.groups)
    high = np.append(np.full(logits, LOGIT_RANGE), problem.limit)
    low = np.append(-high[:-1], 0.0)
    sampling = np.random.default_rng(seed).uniform(low, high, (population, logits + 1))
    sampling[:FIRST_PLANS] = _first_plans(problem)
    algorithm = algorithms.NSGA2(
        pop_size=population,
        sampling=sampling,
        crossover=crossover.SBX(eta=eta, prob=0.9),
        mutation=mutation.PM(eta=eta, prob_var=0.3),
    )
    box = core.Problem(n_var=logits + 1, n_obj=3, xl=low, xu=high)
    algorithm.setup(box, termination=("n_gen", UNLIMITED), seed=seed, verbose=False)
    while True:
        asked = algorithm.ask()
        found = [problem(problem.decode(x[:-1], x[-1])).objectives() for x in asked.get("X")]
        asked.set("F", -np.array(found))
        algorithm.tell(infills=asked)


def cmaes(problem: Problem, seed: int, *, ratios: Sequence[float] = FINE_RATIOS) -> None:
    """CMA-ES on allocation logits at fixed budgets, from the problem's centre.

    One search distribution serves all budgets, whose generations take turns. The fitness changes
    over WEIGHTS from round to round. CMA-ES compares within a generation only, so budgets need
    not be comparable. When a round brings no new plan, the search restarts with a larger step.

    Args:
        problem: the problem.
        seed: random seed.
        ratios: budgets, as pruning ratios.

    Source: CMA-ES (Hansen, arXiv 1604.00772), by the library cmaes.
    Differs from the paper: the objective changes from generation to generation. One distribution
    per budget is the textbook way; with 25 evaluations each they do not leave their start.
    """
    CMA = _host("cmaes").CMA
    budgets = _within(problem, ratios)
    centre = np.zeros(len(problem.groups))
    for ratio in budgets:
        problem(problem.decode(centre, ratio))
    for restart in itertools.count():
        state = int(np.random.SeedSequence([seed, restart]).generate_state(1)[0])
        sigma = 0.7 * 1.3**restart  # the first step size, in logits
        optimiser = CMA(mean=centre, sigma=sigma, population_size=8, seed=state)
        for weight in itertools.cycle(WEIGHTS):
            spent = len(problem.evaluated)
            for ratio in budgets:
                asked = [optimiser.ask() for _ in range(optimiser.population_size)]
                optimiser.tell(
                    [(x, -_fitness(problem(problem.decode(x, ratio)), weight)) for x in asked]
                )
            if len(problem.evaluated) == spent:
                break


def tpe(problem: Problem, seed: int) -> None:
    """Multi-objective TPE on allocation logits and pruning_ratio, all three objectives at once.

    The first plans are the centre at a spread of ratios.

    Source: MOTPE (Ozaki et al., GECCO 2020), by the library optuna. OptSpa (arXiv 2507.20613)
    prunes LLaVA with TPE.
    """
    optuna = _host("optuna")
    real = optuna.distributions.FloatDistribution
    space = {f"logit{i}": real(-LOGIT_RANGE, LOGIT_RANGE) for i in range(len(problem.groups))}
    if free := problem.pruning_ratio is None:
        space["ratio"] = real(0.0, max(problem.limit, 1e-9))
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # no line for every trial
    try:
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=15)
        study = optuna.create_study(directions=["maximize"] * 3, sampler=sampler)
        for plan in _first_plans(problem)[: None if free else 1]:
            study.enqueue_trial(dict(zip(space, map(float, plan), strict=False)))
        while True:
            trial = study.ask(space)
            asked = [trial.params[name] for name in space]
            logits, ratio = (asked[:-1], asked[-1]) if free else (asked, 0.0)
            study.tell(trial, problem(problem.decode(logits, ratio)).objectives())
    finally:
        optuna.logging.set_verbosity(verbosity)


METHODS: dict[str, Method] = {
    "random": random_search,
    "EvoPress": evopress,
    "NSGA-II": nsga2,
    "CMA-ES": cmaes,
    "TPE": tpe,
}


def _within(problem: Problem, ratios: Sequence[float]) -> list[float]:
    """`ratios` clipped to the problem's limit, without repetitions; of a problem with a
    pruning_ratio that one alone."""
    if problem.pruning_ratio is not None:
        ratios = [problem.pruning_ratio]
    return sorted({min(ratio, problem.limit) for ratio in ratios})


def _first_plans(problem: Problem) -> np.ndarray:
    """(FIRST_PLANS, G + 1) the centre at ratios spread evenly from 0 to the limit."""
    n = FIRST_PLANS
    return np.column_stack([np.zeros((n, len(problem.groups))), np.linspace(0, problem.limit, n)])


def _fitness(reward: Reward, weight: float) -> float:
    utility, robustness, _ = reward.objectives()
    return weight * utility + (1 - weight) * robustness


def _host(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtraError(module.partition(".")[0], "studies") from None
