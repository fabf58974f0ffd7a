"""Search methods to compare with: each takes a `Problem` and a seed, and spends the problem's evaluations.

All meet budgets by the same code, all but random search start from the problem's centre (uniform plans, unless it says
otherwise), and all draw from generators of their own: a seed gives the same plans, and the global random states stay as
they are.

The defaults are the best settings found for 300 evaluations of the testbed's 12 groups. Candidates were screened with a
regression on about a thousand evaluated plans, and the best of each method run for real once (48 questions per task of the
search split, seed 0). Hypervolume there, customary setting -> default: EvoPress 0.400 -> 0.408 (budgets up to 0.6, larger
switches), NSGA-II 0.392 -> 0.404, CMA-ES 0.410 -> 0.458 (12 budgets instead of 5), TPE 0.430 -> 0.434 (one variable at a time,
wider box); random search 0.361. One seed each: differences of 0.01 mean little.
"""

import contextlib
import importlib
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hipp_ext.allocators.levels import Levels
from hipp_ext.errors import MissingExtraError
from hipp_ext.evals.studies.search.problem import Keeps, Method, Problem
from hipp_ext.planner.reward import Reward

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
FINE_RATIOS = tuple(round(0.05 * i, 2) for i in range(1, 13))
WEIGHTS = (0.5, 0.8, 0.2)  # of utility; robustness gets the rest
LOGIT_RANGE = 4.0  # of NSGA-II and TPE, which need a box; around the centre; sigmoid(-4) is below the usual floors
NO_END = 10**9


def random_search(problem: Problem, seed: int) -> None:
    """Allocation logits from N(0, 1), the pruning_ratio uniform in [0, largest_ratio]."""
    rng = np.random.default_rng(seed)
    while True:
        problem(
            problem.decode(rng.standard_normal(len(problem.groups)), rng.uniform(0, problem.limit))
        )


def evopress(
    problem: Problem,
    seed: int,
    *,
    offspring: int = 4,
    ratios: Sequence[float] = RATIOS,
    weights: Sequence[float] = WEIGHTS,
    sizes: Sequence[float] = (1 / 4, 1 / 2),
) -> None:
    """(1 + lambda) evolution by level switches at fixed budgets, from the problem's centre.

    The budgets take turns, a generation each; from round to round the fitness changes over `weights`, and the parent is the
    best plan of its budget so far for the weight of the round.

    Args:
        offspring: lambda.
        ratios: the budgets.
        weights: of utility in the fitness; robustness gets the rest.
        sizes: how much one switch moves, in parameters of an average group; drawn evenly.

    Source: EvoPress (arXiv 2410.14649), algorithm 1.
    Differs from the paper: one budget there, several here, which share the evaluations. Fitness is the weighted reward, not
    the KL to dense. Every offspring is evaluated in full: a plan costs the same for all methods, so there is no
    multi-stage selection. A level is a keep count, so a switch moves as many parameters as fit instead of one level for
    another.
    """
    rng = np.random.default_rng(seed)
    budgets = _within(problem, ratios)
    pools: dict[float, dict[Keeps, Reward]] = {ratio: {} for ratio in budgets}
    for ratio, pool in pools.items():
        start = problem.decode(np.zeros(len(problem.groups)), ratio)
        pool[start] = problem(start)
    for weight in itertools.cycle(weights):
        for ratio, pool in pools.items():
            parent = max(pool, key=lambda plan: _fitness(pool[plan], weight))  # noqa: B023 (called at once)
            for _ in range(offspring):
                child = _new_child(
                    problem.levels, parent, pool, problem.levels.budget(ratio), sizes, rng
                )
                pool[child] = problem(child)


def _new_child(
    levels: Levels, parent: Keeps, pool: dict, budget: int, sizes: Sequence[float], rng: Any
) -> Keeps:
    """A mutant of `parent` that is not in `pool`; after many vain tries, one that may be."""
    child = parent
    for attempt in range(60):
        child = parent
        # The less of two draws: mostly one switch. Where plans are nearly used up, more and more of them.
        for _ in range(min(rng.integers(1, 4, 2)) + attempt // 10):
            child = _switch(levels, child, budget, float(rng.choice(sizes)), rng)
        if child not in pool:
            break
    return child


def _switch(levels: Levels, keeps: Keeps, budget: int, size: float, rng: Any) -> Keeps:
    """`keeps` after one group has given parameters to another, the budget met as before."""
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
    # What the taker cannot use goes to the others, in random order, and only then back to the giver.
    worth = rng.random(len(keeps))
    worth[[taker, giver]] = 2.0, -1.0
    return levels.fill(
        changed, budget, [np.full(len(c), w) for c, w in zip(levels.counts, worth, strict=True)]
    )


def nsga2(
    problem: Problem,
    seed: int,
    *,
    population: int = 24,
    first: int = 8,
    eta: float = 3.0,
    rate: float = 0.3,
) -> None:
    """NSGA-II on allocation logits and pruning_ratio, all three objectives at once, from the problem's centre.

    Args:
        population: individuals, and offspring per generation.
        first: how many of the first generation are the centre at a spread of ratios; the others are drawn evenly.
        eta: distribution index of crossover and mutation, higher = children nearer to their parents.
        rate: probability of mutating a variable.

    Source: NSGA-II (Deb et al., IEEE TEC 6(2), 2002), by the library pymoo.
    Differs from it: a dozen generations instead of hundreds, so children go further (eta 15 to 20 and a rate of one over the
    number of variables are customary).
    """
    algorithms, core = _host("pymoo.algorithms.moo.nsga2"), _host("pymoo.core.problem")
    crossover, mutation = (
        _host("pymoo.operators.crossover.sbx"),
        _host("pymoo.operators.mutation.pm"),
    )
    logits = len(problem.groups)
    high = np.append(np.full(logits, LOGIT_RANGE), problem.limit)
    low = np.append(-high[:-1], 0.0)
    sampling = np.random.default_rng(seed).uniform(low, high, (population, logits + 1))
    sampling[:first] = _first_plans(problem, first)
    algorithm = algorithms.NSGA2(
        pop_size=population,
        sampling=sampling,
        crossover=crossover.SBX(eta=eta, prob=0.9),
        mutation=mutation.PM(eta=eta, prob_var=rate),
    )
    box = core.Problem(n_var=logits + 1, n_obj=3, xl=low, xu=high)
    algorithm.setup(box, termination=("n_gen", NO_END), seed=seed, verbose=False)
    while True:
        asked = algorithm.ask()
        found = [problem(problem.decode(x[:-1], x[-1])).objectives() for x in asked.get("X")]
        asked.set("F", -np.array(found))
        algorithm.tell(infills=asked)


def cmaes(
    problem: Problem,
    seed: int,
    *,
    ratios: Sequence[float] = FINE_RATIOS,
    weights: Sequence[float] = WEIGHTS,
    population: int = 8,
    sigma: float = 0.7,
) -> None:
    """CMA-ES on allocation logits at fixed budgets, from the problem's centre.

    One search distribution, whose generations take the budgets in turn; from round to round the fitness changes over
    `weights`. CMA-ES compares within a generation only, so budgets need not be comparable, and what is learned of the groups
    at one budget serves the others. When a round brings no new plan, it starts again with a larger step.

    Args:
        ratios: the budgets.
        weights: of utility in the fitness; robustness gets the rest.
        population: plans per generation.
        sigma: first step size, in logits.

    Source: CMA-ES (Hansen, arXiv 1604.00772), by the library cmaes.
    Differs from it: the objective changes from generation to generation, see above. A distribution for each budget is the
    textbook way; with 25 evaluations each they stay where they began.
    """
    CMA = _host("cmaes").CMA
    budgets = _within(problem, ratios)
    centre = np.zeros(len(problem.groups))
    for ratio in budgets:
        problem(problem.decode(centre, ratio))
    for restart in itertools.count():
        state = int(np.random.SeedSequence([seed, restart]).generate_state(1)[0])
        optimiser = CMA(
            mean=centre, sigma=sigma * 1.3**restart, population_size=population, seed=state
        )
        for weight in itertools.cycle(weights):
            spent = len(problem.evaluated)
            for ratio in budgets:
                asked = [optimiser.ask() for _ in range(population)]
                optimiser.tell(
                    [(x, -_fitness(problem(problem.decode(x, ratio)), weight)) for x in asked]
                )
            if len(problem.evaluated) == spent:
                break


def tpe(
    problem: Problem, seed: int, *, startup: int = 15, first: int = 8, multivariate: bool = False
) -> None:
    """Multi-objective TPE on allocation logits and pruning_ratio, all three objectives at once, from the problem's centre.

    Args:
        startup: trials before the model of good plans takes over, the first plans among them.
        first: how many plans, the centre at a spread of ratios, come first.
        multivariate: model the variables jointly.

    Source: MOTPE (Ozaki et al., GECCO 2020), by the library optuna; OptSpa (arXiv 2507.20613) prunes LLaVA with TPE.
    """
    optuna = _host("optuna")
    real = optuna.distributions.FloatDistribution
    space = {f"logit{i}": real(-LOGIT_RANGE, LOGIT_RANGE) for i in range(len(problem.groups))}
    space["ratio"] = real(0.0, max(problem.limit, 1e-9))
    with _quiet(optuna):
        sampler = optuna.samplers.TPESampler(
            seed=seed, multivariate=multivariate, n_startup_trials=startup
        )
        study = optuna.create_study(directions=["maximize"] * 3, sampler=sampler)
        for plan in _first_plans(problem, first):
            study.enqueue_trial(dict(zip(space, map(float, plan), strict=True)))
        while True:
            trial = study.ask(space)
            *logits, ratio = (trial.params[name] for name in space)
            study.tell(trial, problem(problem.decode(logits, ratio)).objectives())


METHODS: dict[str, Method] = {
    "random": random_search,
    "EvoPress": evopress,
    "NSGA-II": nsga2,
    "CMA-ES": cmaes,
    "TPE": tpe,
}


def _within(problem: Problem, ratios: Sequence[float]) -> list[float]:
    """`ratios`, those beyond the problem's limit brought to it; no two alike."""
    return sorted({min(ratio, problem.limit) for ratio in ratios})


def _first_plans(problem: Problem, n: int) -> np.ndarray:
    """(n, G + 1) the centre at ratios spread evenly from 0 to the limit."""
    return np.column_stack([np.zeros((n, len(problem.groups))), np.linspace(0, problem.limit, n)])


def _fitness(reward: Reward, weight: float) -> float:
    utility, robustness, _ = reward.objectives()
    return weight * utility + (1 - weight) * robustness


def _host(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtraError(module.partition(".")[0], "bench") from None


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """optuna reports every trial, and that multivariate TPE is experimental; here neither, and afterwards as before."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
