"""Plans of rounds: counted in units of the dense model, whatever is pruned, and however."""

import itertools

import pytest
from models import batch, build
from plans import query_plan

from hipp_ext import Calibration, HiPPPlanner, Preference, prune
from hipp_ext.allocators import GlobalThreshold, Sensitivity, Uniform
from hipp_ext.budget import Bounds
from hipp_ext.errors import BudgetError, PlanError
from hipp_ext.groups import find_groups, tower_layers
from hipp_ext.scorers import Magnitude
from hipp_ext.shrink.planning import Standing, check_reach, planner_identity, round_plan
from hipp_ext.surgery.compose import compose

PLAIN = {"pruning_ratio": 0.0, "scorer": Magnitude()}


def rounds(model, planner, ratios, family):
    """The model after every round, without recovery."""
    calibration = Calibration.from_batches([batch(family, size=4, labels=True)])
    for ratio in ratios:
        plan = round_plan(model, planner, ratio, calibration, None, False)
        model = prune(model, plan)
        yield model


@pytest.mark.parametrize(
    ("family", "planner"),
    [
        ("llava_gqa", GlobalThreshold(**PLAIN)),
        ("llava_gqa", Uniform(**PLAIN, attention_unit="query")),
        ("qwen2_5_vl", Uniform(**PLAIN, towers=("language", "vision", "projector"))),
        ("llava", Sensitivity(pruning_ratio=0.0, effort="fisher", bounds=Bounds(round_to=2))),
        ("llama", GlobalThreshold(**PLAIN, bounds=Bounds(drop="blocks"))),
        ("qwen2", HiPPPlanner(Preference(1, 0, 0), effort="fisher", cache=None)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_every_round_meets_its_ratio_of_the_dense_model(family, planner):
    dense, ratios, before = build(family), (0.2, 0.35, 0.45), planner.pruning_ratio
    widths = {g.name: g.width for g in Standing.of(dense, planner).groups}
    kept = [1.0]
    for model, ratio in zip(rounds(dense, planner, ratios, family), ratios, strict=True):
        plan = model.hipp_plan
        assert {g.name: g.width for g in plan.groups} == widths
        assert plan.pruning_ratio >= ratio
        assert plan.pruning_ratio == pytest.approx(ratio, abs=0.06)  # a step of one group
        assert all(g.keep == 0 or g.keep >= 0.1 * g.width for g in plan.groups)
        kept.append(1 - plan.pruning_ratio)
    assert all(a > b for a, b in itertools.pairwise(kept)) and planner.pruning_ratio == before


def test_whole_layers_and_layers_that_are_all_alike():
    ratios = (0.3, 0.6)
    for shape, family in (("layers", "llama"), ("uniform", "qwen3"), ("stock", "qwen3")):
        planner, dense = Uniform(**PLAIN, bounds=Bounds(shape=shape)), build(family)
        for model, ratio in zip(rounds(dense, planner, ratios, family), ratios, strict=True):
            assert model.hipp_plan.pruning_ratio >= ratio
        if shape == "uniform":
            assert len({(g.kind, g.width) for g in find_groups(model)}) == 2
        elif (
            shape == "layers"
        ):  # the first round removed two of three already, and the second one nothing
            assert len(tower_layers(model, "language")) == 1


def test_the_least_of_a_group_is_counted_in_the_dense_model():
    """Not of what the round before left: a tenth of a tenth would be too little."""
    bounds = Bounds(min_keep={"language.0.ffn": 0.5, "language.1.ffn": 0.25})
    planner, dense = GlobalThreshold(**PLAIN, bounds=bounds), build("llama")
    for model in rounds(dense, planner, (0.3, 0.45, 0.5), "llama"):
        kept = {g.name: g.keep / g.width for g in model.hipp_plan.groups}
    assert kept["language.0.ffn"] >= 0.5 and kept["language.1.ffn"] >= 0.25
    assert min(kept.values()) >= 0.1
    with pytest.raises(BudgetError, match="cannot be met"):
        check_reach(Standing.of(model, planner), planner, 0.8)


def test_query_heads_that_are_left_alone_with_their_keys_stay():
    planner = Uniform(**PLAIN, attention_unit="query")
    alone = prune(build("llava_gqa"), query_plan(build("llava_gqa"), steps=(1, 4)))
    gone = alone.hipp_plan.pruning_ratio
    (model,) = rounds(alone, planner, (gone + 0.2,), "llava_gqa")
    plan = model.hipp_plan
    assert plan.pruning_ratio == pytest.approx(gone + 0.2, abs=0.02)
    assert {g.keep for g in plan.groups if g.kind == "query_heads"} == {2}


def test_a_model_that_was_pruned_in_other_units():
    once = prune(build("llava_gqa"), query_plan(build("llava_gqa"), steps=(2, 4)))
    planner = Uniform(**PLAIN, attention_unit="query")
    with pytest.raises(BudgetError, match=r"to=0\.1: the model has lost 0\.\d+ .*Ask for more"):
        check_reach(Standing.of(once, planner), planner, 0.1)
    whole = Standing.of(once, Uniform(**PLAIN)).total
    assert whole.pruning_ratio == once.hipp_plan.pruning_ratio
    removing = Uniform(pruning_ratio=0.3, scorer=Magnitude()).plan(once)
    with pytest.raises(PlanError, match="or of other units"):
        compose(once.hipp_plan, removing, 3)


def test_the_identity_of_a_planner():
    one = GlobalThreshold(pruning_ratio=0.1)
    assert planner_identity(one) == planner_identity(GlobalThreshold(pruning_ratio=0.4))
    assert planner_identity(one) != planner_identity(Uniform(pruning_ratio=0.1))
    assert planner_identity(one) != planner_identity(GlobalThreshold(**PLAIN))
    wish, other = Preference(1, 0, 0), Preference(0, 1, 0)
    assert planner_identity(HiPPPlanner(wish)) == planner_identity(HiPPPlanner(wish))
    assert planner_identity(HiPPPlanner(wish)) != planner_identity(HiPPPlanner(other))
