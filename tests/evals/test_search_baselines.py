"""Search methods on a tiny model: budgets, bounds and seeds."""

import functools
import random
import sys

import numpy as np
import pytest
import torch
from models import batch, build
from plans import meets, removed, within

from hipp_ext.answers import AnswerLogits
from hipp_ext.budget import Bounds
from hipp_ext.errors import BudgetError, MissingExtraError
from hipp_ext.evals.studies.search.methods import FINE_RATIOS, METHODS, cmaes, evopress
from hipp_ext.evals.studies.search.problem import Exhausted, Problem, run
from hipp_ext.groups import find_groups, total_parameters
from hipp_ext.planner.reward import Reward
from hipp_ext.scorers import WandaSP
from hipp_ext.surgery.masks import masked
from hipp_ext.units import plan_from_counts

BATCHES = [batch("llava", size=3, labels=True), batch("llava", size=2, seed=1, labels=True)]
BOUNDS = {"any count": Bounds(), "multiples of 4": Bounds(round_to=4, min_keep=0.2)}
EVALUATIONS = 30


class Closeness:
    """Keep counts -> reward of a random model: how close its answers stay to the dense ones, on two
    halves of the rows.
    """

    def __init__(self):
        self.model = build("llava")
        self.groups = find_groups(self.model)
        self.scores = WandaSP()(self.model, BATCHES)
        self.answers = AnswerLogits(self.model, BATCHES)
        self.dense = self.answers(self.model).log_softmax(-1)

    def kl(self, keeps):
        with masked(self.model, plan_from_counts(self.groups, keeps, self.scores)):
            return (self.dense.exp() * (self.dense - self.answers(self.model).log_softmax(-1))).sum(
                -1
            )

    def __call__(self, keeps):
        kl = self.kl(keeps)
        ratio = removed(self.groups, keeps) / total_parameters(self.groups)
        return Reward(
            utility=1 - float(kl[:2].mean()), robustness=1 - float(kl[2:].mean()), compression=ratio
        )


class Plain(Reward):
    """beartype, which is on in tests only, draws from the global generator when it checks the list
    that a Reward returns.
    """

    def objectives(self):
        return [self.utility, self.robustness, self.compression]


class ChannelsMatter:
    """All depends on the FFN groups: the best plans remove heads before channels. Draws no random
    numbers.
    """

    def __init__(self, groups):
        self.groups = groups

    def __call__(self, keeps):
        channels = [k / g.width for g, k in zip(self.groups, keeps, strict=True) if g.kind == "ffn"]
        kept = sum(channels) / len(channels)
        ratio = removed(self.groups, keeps) / total_parameters(self.groups)
        return Plain(utility=kept, robustness=kept, compression=ratio)


@pytest.fixture(scope="module")
def closeness():
    return Closeness()


def problem_of(
    closeness, bounds=BOUNDS["any count"], evaluations=EVALUATIONS, **options
) -> Problem:
    return Problem(
        groups=closeness.groups,
        bounds=bounds,
        evaluate=closeness,
        evaluations=evaluations,
        **options,
    )


def global_states():
    numpy_state = np.random.get_state()  # noqa: NPY002 (the state in question)
    return (
        random.getstate(),
        [np.asarray(part).tolist() for part in numpy_state],
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_spends_its_evaluations_on_allowed_plans(closeness, name, bounds):
    first = run(METHODS[name], problem_of(closeness, bounds), seed=5)
    plans = [keeps for keeps, _ in first.evaluated]
    assert 0.9 * EVALUATIONS <= len(plans) <= EVALUATIONS and len(set(plans)) == len(plans)
    assert all(within(closeness.groups, keeps, bounds) for keeps in plans)
    step = max(
        s * g.unit_parameters
        for s, g in zip(bounds.steps(closeness.groups)[1], closeness.groups, strict=True)
    )
    assert max(r.compression for _, r in first.evaluated) < first.limit + step / total_parameters(
        closeness.groups
    )
    again = run(METHODS[name], problem_of(closeness, bounds), seed=5)
    assert again.evaluated == first.evaluated
    other = run(METHODS[name], problem_of(closeness, bounds), seed=6)
    assert [keeps for keeps, _ in other.evaluated] != plans


@pytest.mark.parametrize("name", [name for name in METHODS if name != "random"])
def test_a_method_starts_where_the_problem_says(closeness, name):
    logits = np.linspace(-1.5, 1.5, len(closeness.groups))
    problem = run(
        METHODS[name],
        problem_of(closeness, evaluations=4, centre=lambda ratio: ratio * logits),
        seed=0,
    )
    ratios = [*FINE_RATIOS, *np.linspace(0, problem.limit, 8)]
    from_centre, from_uniform = (
        {p.decode(0 * logits, r) for r in ratios} for p in (problem, problem_of(closeness))
    )
    assert problem.decode(-0.5 * logits, 0.5) == problem_of(closeness).decode(0 * logits, 0.5)
    plans = {keeps for keeps, _ in problem.evaluated}
    assert (
        plans <= from_centre and len(plans - from_uniform) >= 2
    )  # where nothing goes, all centres are alike


@pytest.mark.parametrize("name", ["CMA-ES", "TPE"])
def test_a_problem_with_a_ratio_is_searched_there_alone(closeness, name):
    logits = np.linspace(-1.5, 1.5, len(closeness.groups))
    problem = problem_of(
        closeness, evaluations=14, pruning_ratio=0.3, centre=lambda ratio: ratio * logits
    )
    plans = [keeps for keeps, _ in run(METHODS[name], problem, seed=0).evaluated]
    assert len(set(plans)) == len(plans) == 14
    assert all(meets(closeness.groups, keeps, 0.3, problem.bounds) for keeps in plans)
    assert plans[0] == problem_of(closeness).decode(0.3 * logits, 0.3)


@pytest.mark.parametrize("method", [evopress, cmaes])
def test_methods_at_fixed_budgets_share_the_evaluations_among_them(closeness, method):
    bounds, ratios = BOUNDS["any count"], (0.1, 0.3, 0.45)
    problem = run(
        functools.partial(method, ratios=ratios), problem_of(closeness, evaluations=75), seed=0
    )
    plans = [keeps for keeps, _ in problem.evaluated]
    met = {
        ratio: sum(meets(closeness.groups, keeps, ratio, bounds) for keeps in plans)
        for ratio in ratios
    }
    assert sum(met.values()) == len(plans) and min(met.values()) >= 17, met


@pytest.mark.parametrize("name", METHODS)
def test_a_method_finds_what_is_there_and_leaves_global_states_alone(closeness, name):
    before = global_states()
    problem = Problem(
        groups=closeness.groups,
        bounds=Bounds(),
        evaluate=ChannelsMatter(closeness.groups),
        evaluations=120,
    )
    run(METHODS[name], problem, seed=0)
    assert global_states() == before
    uniform = problem.evaluate(problem.decode([0.0] * len(closeness.groups), 0.3))
    best = max(r.utility for _, r in problem.evaluated if r.compression >= 0.3)
    assert best > uniform.utility + 0.05


@pytest.mark.parametrize(
    ("name", "library"), [("NSGA-II", "pymoo"), ("CMA-ES", "cmaes"), ("TPE", "optuna")]
)
def test_a_missing_library_is_named(closeness, monkeypatch, name, library):
    for module in [m for m in sys.modules if m.partition(".")[0] == library] + [library]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        MissingExtraError, match=rf'{library} is not installed.*"hipp-ext\[studies\]"'
    ):
        METHODS[name](problem_of(closeness), 0)


def test_optuna_logs_as_before(closeness):
    import optuna

    before = optuna.logging.get_verbosity()
    run(METHODS["TPE"], problem_of(closeness, evaluations=5), seed=0)
    assert optuna.logging.get_verbosity() == before


def test_a_known_plan_costs_nothing_and_a_new_one_beyond_the_budget_is_refused(closeness):
    problem = problem_of(closeness, evaluations=2)
    plans = [problem.decode([0.0] * 6, ratio) for ratio in (0.1, 0.2, 0.3)]
    rewards = [problem(p) for p in plans[:2]]
    assert [problem(p) for p in plans[:2]] == rewards and problem.lookups == 2
    with pytest.raises(Exhausted, match="all 2 evaluations"):
        problem(plans[2])
    assert problem.evaluated == list(zip(plans[:2], rewards, strict=True))


def test_a_method_that_asks_for_the_same_plan_for_ever_ends(closeness):
    def stuck(problem, seed):
        while True:
            problem(problem.levels.least)

    problem = run(stuck, problem_of(closeness, evaluations=3), seed=0)
    assert len(problem.evaluated) == 1 and problem.lookups == 61


def test_errors_of_a_method_are_not_swallowed(closeness):
    with pytest.raises(BudgetError, match=r"asked for \(0, .*do not allow"):
        run(lambda problem, _: problem((0,) * 6), problem_of(closeness), seed=0)
    with pytest.raises(BudgetError, match="do not allow"):
        problem_of(closeness, BOUNDS["multiples of 4"])((4, 43, 4, 44, 4, 44))


def test_decoding_stays_within_the_limit(closeness):
    problem = problem_of(closeness, largest_ratio=0.4)
    assert meets(closeness.groups, problem.decode([0.0] * 6, 0.9), 0.4, problem.bounds)
    assert problem.decode([0.0] * 6, -0.2) == tuple(g.width for g in closeness.groups)
    tight = problem_of(closeness, Bounds(min_keep=0.8))
    assert 0.05 < tight.limit < 0.2 and tight.decode([0.0] * 6, 0.6) == tight.levels.least
