"""Allocators on a tiny model: exact budgets, bounds, and what each of them prefers."""

import dataclasses

import numpy as np
import pytest
import torch
from models import batch, build
from plans import meets, within

from hipp_ext import HiPPPlanner, Preference
from hipp_ext.allocators import ALLOCATORS, OWL, FLAPAdaptive, GlobalThreshold, Sensitivity, Uniform
from hipp_ext.allocators.levels import Levels
from hipp_ext.budget import Bounds
from hipp_ext.calibration import Calibration
from hipp_ext.errors import BudgetError, CalibrationError
from hipp_ext.groups import find_groups, total_parameters
from hipp_ext.plan import PruningPlan
from hipp_ext.scorers import FLAP, SCORERS, Magnitude, WandaSP
from hipp_ext.sensitivity.curves import LEVELS
from hipp_ext.units import plan_from_counts

BATCHES = [batch("llava", size=3, labels=True), batch("llava", size=2, seed=1, labels=True)]

BOUNDS = {"any count": Bounds(), "multiples of 4": Bounds(round_to=4, min_keep=0.2)}
MODEL = build("llava")
CALIBRATION = Calibration.of(MODEL, BATCHES)
GROUPS = find_groups(MODEL)
SCORES = WandaSP()(MODEL, BATCHES)


@pytest.fixture(scope="module")
def measured():
    """What each allocator measures of the model, once."""
    return {
        kind: kind(pruning_ratio=0.0).measure(MODEL, GROUPS, SCORES, CALIBRATION)
        for kind in ALLOCATORS.values()
    }


def kept(kind, ratio, measured, **options) -> tuple[int, ...]:
    return kind(pruning_ratio=ratio, **options).keep_counts(GROUPS, SCORES, measured[kind])


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("name", ALLOCATORS)
def test_an_allocator_meets_every_ratio_within_one_unit(measured, name, bounds):
    kind = ALLOCATORS[name]
    for ratio in (0.0, 0.1, 0.37, 0.5):
        counts = kept(kind, ratio, measured, bounds=bounds)
        assert meets(GROUPS, counts, ratio, bounds) and within(GROUPS, counts, bounds), ratio
        assert all(isinstance(k, int) for k in counts)
    with pytest.raises(BudgetError, match="cannot be met"):
        kept(kind, 0.97, measured, bounds=bounds)
    with pytest.raises(BudgetError, match="cannot be met"):
        kind(pruning_ratio=0.97).plan(MODEL)  # before calibration data is looked for
    with pytest.raises(BudgetError, match=r"a number in \[0, 1\)"):
        kind(pruning_ratio=1.0)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_the_front_door_gives_the_same_counts(measured, name):
    before = {k: v.clone() for k, v in MODEL.state_dict().items()}
    plan = ALLOCATORS[name](pruning_ratio=0.37).plan(MODEL, calibration=iter(BATCHES))
    assert isinstance(plan, PruningPlan) and plan.scorer == "WandaSP"
    counts = kept(ALLOCATORS[name], 0.37, measured)
    assert plan == plan_from_counts(GROUPS, counts, SCORES, scorer="WandaSP")
    assert all(torch.equal(v, before[k]) for k, v in MODEL.state_dict().items())


@pytest.mark.parametrize("name", SCORERS)
def test_any_scorer_works_with_any_allocator(name):
    scorer = SCORERS[name]()
    plans = [
        kind(pruning_ratio=0.3, scorer=scorer).plan(MODEL, calibration=BATCHES)
        for kind in (Uniform, GlobalThreshold)
    ]
    for plan in plans:
        assert plan.scorer == type(scorer).__name__
        assert meets(GROUPS, [g.keep for g in plan.groups], 0.3, Bounds())
    assert plans[0] != plans[1]


def test_what_needs_no_data_asks_for_none():
    plan = Uniform(pruning_ratio=0.3, scorer=Magnitude()).plan(MODEL)
    assert plan.scorer == "Magnitude"
    with pytest.raises(CalibrationError, match="No calibration data"):
        OWL(pruning_ratio=0.3, scorer=Magnitude()).plan(MODEL)


@pytest.mark.parametrize("robustness", [0.5, 0.25, 0.9])
def test_an_untrained_planner_allocates_by_sensitivity(robustness):
    """Without pictures there is no visual sensitivity, which is all that the planner adds."""
    model = build("llama", seed=2).double()
    calibration = {"utility": [batch("llama")], "robustness": [batch("llama", seed=1)]}
    allocator = Sensitivity(pruning_ratio=0.41, robustness_weight=robustness)
    planner = HiPPPlanner(Preference(1 - robustness, robustness, 0), pruning_ratio=0.41, cache=None)
    plans = [maker.plan(model, calibration=calibration) for maker in (allocator, planner)]
    assert plans[0].groups == plans[1].groups
    other = dataclasses.replace(allocator, robustness_weight=1 - robustness)
    same = other.plan(model, calibration=calibration).groups == plans[0].groups
    assert same == (robustness == 0.5)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Uniform, {"bounds": 3}, "budget.Bounds are needed"),
        (Sensitivity, {"robustness_weight": 1.5}, r"in \[0, 1\]"),
    ],
)
def test_wrong_settings_are_refused(kind, options, message):
    with pytest.raises(BudgetError, match=message):
        kind(pruning_ratio=0.3, **options)


@pytest.mark.parametrize(("model", "message"), [("folder", "not the path"), (3, "not int")])
def test_what_is_no_model_is_refused(model, message):
    with pytest.raises(TypeError, match=message):
        Uniform(pruning_ratio=0.3).plan(model)


def test_the_global_threshold_takes_the_lowest_scores_first():
    scores = {g.name: torch.ones(g.width) for g in GROUPS}
    scores["language.1.ffn"] = torch.cat([torch.full((30,), 0.01), torch.full((14,), 100.0)])
    low = 30 * GROUPS[3].unit_parameters / total_parameters(GROUPS)
    allocator = GlobalThreshold(pruning_ratio=low)
    counts = dict(
        zip([g.name for g in GROUPS], allocator.keep_counts(GROUPS, scores, None), strict=True)
    )
    assert counts.pop("language.1.ffn") == 14
    assert all(counts[g.name] == g.width for g in GROUPS if g.name in counts)
    # The scale of a group's scores means nothing.
    scores["language.2.ffn"] = 1e-3 * scores["language.2.ffn"]
    assert allocator.keep_counts(GROUPS, scores, None)[3] == 14


@pytest.mark.parametrize("kind", [GlobalThreshold, FLAPAdaptive])
def test_a_threshold_over_units_of_one_cost_keeps_the_best_of_all(kind):
    groups = GROUPS[1::2]  # FFN groups: all units cost the same
    found = kind(pruning_ratio=0.0).measure(MODEL, groups, SCORES, CALIBRATION)
    if kind is FLAPAdaptive:
        raw = [FLAP()(MODEL, BATCHES)[g.name].numpy() for g in groups]
        comparable = [(r - r.mean()) / r.std() for r in raw]
    else:
        comparable = [(r := SCORES[g.name].numpy()) / r.mean() for g in groups]
    for ratio in (0.1, 0.37):
        threshold = np.sort(np.concatenate(comparable))[::-1][int((1 - ratio) * 3 * 44) - 1]
        counts = kind(pruning_ratio=ratio).keep_counts(groups, SCORES, found)
        assert counts == tuple(int((c >= threshold).sum()) for c in comparable)


def test_owl_keeps_more_of_a_group_with_outliers():
    model = build("llava")
    with torch.no_grad():
        model.get_submodule(GROUPS[3].consumer).weight[:, :2] *= 30
    allocator, scores = OWL(pruning_ratio=0.3), WandaSP()(model, BATCHES)
    outliers = allocator.measure(model, GROUPS, scores, CALIBRATION)
    assert int(outliers.argmax()) == 3 and 0.02 < outliers[3] <= 2 / 44
    uniform = Uniform(pruning_ratio=0.3).keep_counts(GROUPS, scores, None)
    assert allocator.keep_counts(GROUPS, scores, outliers)[3] >= uniform[3] + 3


def test_owl_stays_in_its_band(measured):
    for ratio in (0.2, 0.4):
        for g, k in zip(GROUPS, kept(OWL, ratio, measured), strict=True):
            assert abs(1 - k / g.width - ratio) <= 2 * 0.08 + 1 / g.width


def test_sensitivity_promises_less_loss_than_any_other_allocation(measured):
    table = measured[Sensitivity].mean(0)

    def promised(counts):
        return sum(
            np.interp(1 - k / g.width, [0, *LEVELS], [0, *curve])
            for g, k, curve in zip(GROUPS, counts, table.tolist(), strict=True)
        )

    for ratio in (0.1, 0.37, 0.5):
        losses = {name: promised(kept(kind, ratio, measured)) for name, kind in ALLOCATORS.items()}
        assert losses.pop("sensitivity") < min(losses.values())


def test_levels():
    levels = Levels.of(GROUPS, BOUNDS["multiples of 4"])
    # Heads have 10 columns, so they go in pairs; 20% of 44 channels is 8.8.
    assert levels.counts[0].tolist() == [2, 4]
    assert levels.counts[1].tolist() == list(range(12, 45, 4))
    assert levels.total == total_parameters(GROUPS) and levels.parameters([0] * 6) == 0
    assert [levels.level_of(1, keep) for keep in (11, 17.5, 99)] == [0, 1, 8]
    with pytest.raises(BudgetError, match="the bounds let at most 0.6"):
        levels.budget(0.75)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_an_allocator_may_drop_blocks(name):
    bounds = Bounds(drop="blocks", min_keep=0.3)
    for ratio in (0.3, 0.85):
        plan = ALLOCATORS[name](pruning_ratio=ratio, bounds=bounds).plan(
            MODEL, calibration=CALIBRATION
        )
        assert plan.pruning_ratio >= ratio
        assert bounds.allow(GROUPS, np.array([list(plan.keep_counts.values())])).all()
    assert 0 in plan.keep_counts.values()  # with floors of 0.3, 0.85 cannot be met otherwise


def test_sensitivity_drops_what_the_answers_do_not_need():
    model = build("llava")
    with torch.no_grad():
        model.get_submodule(GROUPS[1].consumer).weight *= 1e-3
        model.get_submodule(GROUPS[2].consumer).weight *= 1e-3
    for drop in ("blocks", "layers"):
        bounds = Bounds(drop=drop)
        plan = Sensitivity(pruning_ratio=0.4, bounds=bounds).plan(model, calibration=BATCHES)
        gone = [name for name, keep in plan.keep_counts.items() if not keep]
        assert gone == (["language.0.ffn", "language.1.attention"] if drop == "blocks" else [])


def test_one_threshold_cannot_drop_layers():
    bounds = Bounds(drop="layers")
    with pytest.raises(BudgetError, match="needs an allocator that gives every group a fraction"):
        GlobalThreshold(pruning_ratio=0.3, bounds=bounds).plan(MODEL, calibration=CALIBRATION)
