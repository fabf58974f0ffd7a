"""Laws of the budget: exact, monotone, bounded, or an error that says why not."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipp_ext.budget import Bounds, Cost, keep_counts, largest_ratio, many_keep_counts, max_ratio
from hipp_ext.errors import BudgetError
from hipp_ext.groups import Group, Slice, total_parameters


def group(layer: int, kind: str, width: int, unit_parameters: int, columns: int = 1) -> Group:
    return Group(
        tower="language",
        layer=layer,
        kind=kind,
        width=width,
        owns=(Slice(parameter="layer.weight", dim=1, size=columns),),
        unit_parameters=unit_parameters,
        unit_flops=2 * unit_parameters,
    )


groups_strategy = st.lists(
    st.tuples(st.integers(1, 211), st.integers(1, 4099), st.sampled_from([1, 3, 8, 64])),
    min_size=1,
    max_size=12,
).map(lambda rows: tuple(group(i, "ffn", w, c, col) for i, (w, c, col) in enumerate(rows)))


@settings(max_examples=200, deadline=None)
@given(groups_strategy, st.data())
def test_the_budget_is_met_to_one_step(groups, data):
    logits = data.draw(st.lists(st.floats(-9, 9), min_size=len(groups), max_size=len(groups)))
    bounds = Bounds(
        round_to=data.draw(st.sampled_from([1, 2, 16, 64])),
        min_keep=data.draw(st.sampled_from([0.0, 0.1, 0.5])),
    )
    ratio = data.draw(st.floats(0, 1)) * max_ratio(groups, bounds) * 0.999999
    counts = keep_counts(groups, logits, ratio, bounds)
    kept = sum(k * g.unit_parameters for k, g in zip(counts, groups, strict=True))
    target = math.floor((1 - ratio) * total_parameters(groups) + 1e-6)
    assert kept <= target
    for k, g in zip(counts, groups, strict=True):
        step = g.multiple(bounds.round_to)
        assert max(1, math.ceil(bounds.min_keep * g.width - 1e-9)) <= k <= g.width
        assert k == g.width or (k * g.columns) % bounds.round_to == 0
        if k < g.width:  # one more step of any group would break the budget
            assert kept + min(step, g.width - k) * g.unit_parameters > target


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-6, 6), min_size=2, max_size=9), st.floats(0, 0.99), st.integers(2, 97))
def test_a_higher_allocation_never_keeps_less(logits, ratio, width):
    groups = tuple(group(i, "ffn", width, 7) for i in range(len(logits)))
    counts = keep_counts(groups, logits, ratio * max_ratio(groups))
    for a, x in zip(counts, logits, strict=True):
        for b, y in zip(counts, logits, strict=True):
            assert not (x > y + 1e-6 and a < b - 1)


@settings(max_examples=50, deadline=None)
@given(groups_strategy, st.floats(-5, 5))
def test_only_differences_of_the_allocation_count(groups, shift):
    logits = [math.sin(i) for i in range(len(groups))]
    ratio = max_ratio(groups) / 2
    a = keep_counts(groups, logits, ratio)
    b = keep_counts(groups, [x + shift for x in logits], ratio)
    # Bisection ends within floating-point error of the same point: at most one step apart.
    assert all(abs(x - y) <= 1 for x, y in zip(a, b, strict=True))


def test_nothing_is_pruned_at_ratio_zero():
    groups = (group(0, "attention", 7, 100, 13), group(0, "ffn", 31, 11))
    assert keep_counts(groups, [3.0, -3.0], 0.0, Bounds(round_to=64)) == (7, 31)


def test_floors_of_single_groups():
    groups = (group(0, "ffn", 100, 1), group(1, "ffn", 100, 1))
    assert keep_counts(groups, [-9, 9], 0.5, Bounds(min_keep={"language.0.ffn": 0.4}))[0] == 40


def test_without_an_allocation_every_group_keeps_the_same_share():
    groups = (group(0, "ffn", 100, 1), group(1, "ffn", 10, 1), group(2, "attention", 20, 3))
    assert keep_counts(groups, None, 0.4) == keep_counts(groups, [1.5] * 3, 0.4) == (60, 6, 12)


@pytest.mark.parametrize("ratio", [1.0, -0.1, float("nan"), "0.3", True, None])
def test_a_ratio_outside_the_range_is_refused(ratio):
    with pytest.raises(BudgetError, match=r"a number in \[0, 1\) is needed"):
        keep_counts((group(0, "ffn", 10, 1),), [0.0], ratio)


def test_an_unreachable_ratio_names_the_bounds_and_what_can_be_reached():
    groups = (group(0, "ffn", 100, 1), group(1, "ffn", 100, 1))
    with pytest.raises(
        BudgetError,
        match=r"0\.8 cannot be met with min_keep 0\.5 and round_to 64: at most 0\.3600 can go",
    ):
        keep_counts(groups, [0, 0], 0.8, Bounds(min_keep=0.5, round_to=64))


@pytest.mark.parametrize("logits", [[0.0], [0.0, float("nan")], [0.0, float("inf")]])
def test_an_allocation_that_does_not_fit_is_refused(logits):
    with pytest.raises(BudgetError, match="needs 2 finite numbers"):
        keep_counts((group(0, "ffn", 9, 1), group(1, "ffn", 9, 1)), logits, 0.1)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"round_to": 0}, "round_to=0"),
        ({"round_to": True}, "round_to=True"),
        ({"round_to": "8"}, "round_to='8'"),
        ({"round_to": 2.5}, r"round_to=2\.5"),
        ({"round_to": 10**30}, "round_to=1000"),
        ({"min_keep": 1.5}, "min_keep=1.5"),
        ({"min_keep": "all"}, "min_keep='all'"),
        ({"min_keep": True}, "min_keep=True"),
        ({"min_keep": {"language.0.ffn": "1"}}, "min_keep='1'"),
        ({"max_keep": 1.5}, "max_keep=1.5"),
        ({"max_keep": "all"}, "max_keep='all'"),
        ({"min_keep": 0.9, "max_keep": 0.5}, r"min_keep=0\.9 is larger than max_keep=0\.5"),
        ({"min_keep": {"a": 0.9}, "max_keep": 0.5}, r"is larger than max_keep=0\.5"),
    ],
)
def test_bounds_are_checked(bounds, message):
    with pytest.raises(BudgetError, match=message):
        Bounds(**bounds)


def test_numbers_of_other_types_are_taken_for_what_they_are():
    same = (
        Bounds(round_to=np.int64(8), min_keep=np.float32(0.5)),
        Bounds(round_to=8.0, min_keep=Fraction(1, 2)),
    )
    assert (
        same[0] == same[1] == Bounds(round_to=8, min_keep=0.5)
        and type(same[0].round_to) is type(same[1].round_to) is int
    )
    groups = (group(0, "ffn", 100, 1),)
    assert (
        keep_counts(groups, None, np.float32(0.25))
        == keep_counts(groups, None, Fraction(1, 4))
        == (75,)
    )
    assert keep_counts(groups, None, np.int64(0)) == (100,)


@settings(max_examples=100, deadline=None)
@given(groups_strategy, st.data())
def test_no_group_keeps_more_than_the_bounds_allow(groups, data):
    bounds = Bounds(
        round_to=data.draw(st.sampled_from([1, 2, 16])),
        min_keep=0.1,
        max_keep=data.draw(st.sampled_from([0.1, 0.5, 0.9])),
    )
    ratio = data.draw(st.floats(0, 1)) * max_ratio(groups, bounds) * 0.999999
    counts = np.array(keep_counts(groups, None, ratio, bounds))
    assert bounds.allow(groups, counts[None]).all()
    least, step = bounds.steps(groups)
    most, widths = bounds.most(groups), np.array([g.width for g in groups])
    assert (counts <= most).all() and (most <= np.maximum(least, bounds.max_keep * widths)).all()
    assert ((most + step > bounds.max_keep * widths) | (most == widths)).all()
    assert not bounds.allow(groups, (most + 1)[None]).any()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_cost_of_products_is_met_to_one_step(data):
    widths = data.draw(st.lists(st.integers(1, 40), min_size=2, max_size=6))
    number = st.integers(0, 9)
    factor = st.tuples(
        number, st.lists(st.tuples(st.integers(0, len(widths) - 1), number), max_size=3).map(tuple)
    )
    terms = st.tuples(number, st.lists(factor, max_size=3).map(tuple))
    drawn = data.draw(st.lists(terms, max_size=5))
    every = tuple((1, ((1, ((i, 1),)), (0, ((i, 2),)))) for i in range(len(widths)))
    cost = Cost(name="entries", terms=(*drawn, *every))

    def by_hand(counts):
        total = 0
        for coefficient, factors in cost.terms:
            for fixed, sizes in factors:
                coefficient *= fixed + sum(counts[i] * size for i, size in sizes)
            total += coefficient
        return total

    groups = tuple(group(i, "ffn", w, 1) for i, w in enumerate(widths))
    least, _ = Bounds().steps(groups)
    ratio = data.draw(st.floats(0, 1)) * (1 - by_hand(least.tolist()) / by_hand(widths)) * 0.999999
    counts = list(keep_counts(groups, None, ratio, cost=cost))
    target = math.floor((1 - ratio) * by_hand(widths) + 1e-6)
    assert cost(counts) == by_hand(counts) <= target
    for i, width in enumerate(widths):
        raised = [k + (i == j) for j, k in enumerate(counts)]
        assert counts[i] == width or by_hand(raised) > target


layers_strategy = st.lists(
    st.tuples(st.integers(2, 40), st.integers(1, 999), st.integers(1, 90), st.integers(1, 99)),
    min_size=2,
    max_size=6,
).map(
    lambda rows: tuple(
        group(i, kind, width, unit)
        for i, (heads, head, channels, channel) in enumerate(rows)
        for kind, width, unit in (("attention", heads, head), ("ffn", channels, channel))
    )
)


@settings(max_examples=150, deadline=None)
@given(layers_strategy, st.data())
def test_blocks_and_layers_are_dropped_within_the_budget(groups, data):
    logits = data.draw(st.lists(st.floats(-20, 9), min_size=len(groups), max_size=len(groups)))
    drop = data.draw(st.sampled_from(["blocks", "layers"]))
    bounds = Bounds(min_keep=data.draw(st.sampled_from([0.1, 0.5])), drop=drop)
    ratio = data.draw(st.floats(0, 1)) * max_ratio(groups, bounds) * 0.999999
    counts = keep_counts(groups, logits, ratio, bounds)
    kept = sum(k * g.unit_parameters for k, g in zip(counts, groups, strict=True))
    target = math.floor((1 - ratio) * total_parameters(groups) + 1e-6)
    assert 0 < kept <= target
    assert bounds.allow(groups, np.array([counts])).all()
    for k, g in zip(counts, groups, strict=True):
        if 0 < k < g.width:  # one more unit of any group that stays would break the budget
            assert kept + g.unit_parameters > target
    for attention, ffn in zip(counts[::2], counts[1::2], strict=True):
        assert drop == "blocks" or (attention == 0) == (ffn == 0)


def test_a_block_goes_where_the_allocation_says_so_and_only_where_it_may():
    groups = tuple(group(i, kind, 10, 10) for i in range(3) for kind in ("attention", "ffn"))
    logits = [3, -20, 3, 3, -20, -20]
    assert keep_counts(groups, logits, 0.5, Bounds(drop="blocks")) == (10, 0, 10, 10, 0, 0)
    assert keep_counts(groups, logits, 0.5, Bounds(drop="layers")) == (10, 1, 10, 9, 0, 0)
    assert keep_counts(groups, logits, 0.5) == (9, 1, 9, 9, 1, 1)
    assert max_ratio(groups, Bounds(drop="blocks")) == pytest.approx(1 - 1 / 60)
    assert max_ratio(groups, Bounds(drop="layers")) == pytest.approx(1 - 2 / 60)
    with pytest.raises(BudgetError, match="and drop blocks: at most 0.9833 can go"):
        keep_counts(groups, None, 0.99, Bounds(drop="blocks"))
    with pytest.raises(BudgetError, match="drop='heads': one of"):
        Bounds(drop="heads")


HEADS = (None, (1, 2, 3, 4, 6, 12), (4, 12), (12,))


def alike(layers: int, stock_counts=None, channels: int = 97) -> tuple[Group, ...]:
    """Layers of twelve heads and some channels."""
    blocks = [
        (replace(group(i, "attention", 12, 640, 5), stock_counts=stock_counts), i)
        for i in range(layers)
    ]
    return tuple(g for a, i in blocks for g in (a, group(i, "ffn", channels, 30)))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.sampled_from(HEADS), st.sampled_from([1, 10]), st.data())
def test_a_uniform_plan_is_alike_in_all_layers_and_meets_the_budget(layers, heads, round_to, data):
    groups, bounds = alike(layers, heads), Bounds(shape="uniform", round_to=round_to)
    logits = data.draw(st.lists(st.floats(-9, 9), min_size=len(groups), max_size=len(groups)))
    ratio = data.draw(st.floats(0, 1)) * largest_ratio(groups, bounds)
    counts = keep_counts(groups, logits, ratio, bounds)
    assert counts == counts[:2] * layers
    assert heads is None or counts[0] in heads
    assert bounds.allow(groups, np.array([counts]))[0]
    cost, target = Cost.parameters(groups), (1 - ratio) * total_parameters(groups) + 1e-6
    assert cost(counts) <= target
    for members, allowed in bounds.uniform_parts(groups):
        larger = allowed[allowed > counts[members[0]]]
        if len(larger):  # the next allowed count of a part would break the budget
            raised = np.array(counts)
            raised[members] = larger[0]
            assert cost(raised) > target
    many = many_keep_counts(groups, np.array([logits] * 2), np.array([ratio, 0.0]), bounds)
    assert tuple(many[0]) == counts and tuple(many[1]) == tuple(g.width for g in groups)


def test_a_uniform_plan_follows_the_allocation():
    groups = alike(4)
    for fraction in (0.3, 0.5, 0.8):
        heads, rest = (
            keep_counts(groups, [a, b] * 4, 1 - fraction, Bounds(shape="uniform"))[:2]
            for a, b in ((2, -2), (-2, 2))
        )
        assert heads[0] > rest[0] and heads[1] < rest[1]


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 6), st.data())
def test_a_plan_of_layers_drops_those_with_the_lowest_allocation(layers, data):
    groups, bounds = alike(layers), Bounds(shape="layers")
    order = data.draw(st.permutations(range(layers)))
    ratio = data.draw(st.floats(0, 1)) * largest_ratio(groups, bounds)
    counts = keep_counts(groups, [float(order[g.layer]) for g in groups], ratio, bounds)
    gone = {order[g.layer] for g, k in zip(groups, counts, strict=True) if k == 0}
    assert all(k in (0, g.width) for g, k in zip(groups, counts, strict=True))
    assert gone == set(range(len(gone))) and len(gone) == math.ceil(ratio * layers - 1e-9)
    assert bounds.allow(groups, np.array([counts]))[0]


def test_a_layer_that_stock_transformers_needs_stays():
    groups = [replace(g, removable=g.layer > 1) for g in alike(4)]
    bounds = Bounds(shape="layers")
    assert max_ratio(groups, bounds) == 0.5
    counts = keep_counts(groups, [-g.layer for g in groups], 0.5, bounds)
    assert [k > 0 for k in counts] == [True] * 4 + [False] * 4
    assert not bounds.allow(groups, np.array([[0, 0, 12, 97, 12, 97, 12, 97]]))[0]


def test_of_two_stock_shapes_the_one_nearer_to_the_allocation_is_taken():
    groups, stock = alike(4), Bounds(shape="stock")
    layers = [9.0, 9.0, -9.0, -9.0, 9.0, 9.0, 9.0, 9.0]
    for logits, shape in (([0.0] * 8, "uniform"), (layers, "layers")):
        counts = keep_counts(groups, logits, 0.25, stock)
        assert counts == keep_counts(groups, logits, 0.25, Bounds(shape=shape))
        assert stock.allow(groups, np.array([counts]))[0]
        many = many_keep_counts(groups, np.array([logits]), np.array([0.25]), stock)
        assert tuple(many[0]) == counts
    assert max_ratio(groups, stock) == max_ratio(groups, Bounds(shape="uniform"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "square"}, "one of"),
        ({"shape": "uniform", "drop": "layers"}, "exclude each other"),
        ({"shape": "stock", "drop": "blocks"}, "exclude each other"),
        ({"shape": "layers", "drop": "blocks"}, "drops whole layers"),
        ({"shape": "layers", "min_keep": 0.5}, "drops whole layers"),
        ({"shape": "layers", "max_keep": 0.5}, "drops whole layers"),
    ],
)
def test_shapes_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(BudgetError, match=message):
        Bounds(**options)


def test_uneven_layers_have_no_uniform_plan():
    groups = (*alike(2), *alike(1, channels=50))
    with pytest.raises(BudgetError, match=r"equal widths .* \[50, 97\]"):
        keep_counts(groups, None, 0.3, Bounds(shape="uniform"))
    with pytest.raises(BudgetError, match="No keep count of the attention groups"):
        keep_counts(alike(2, (12,)), None, 0.3, Bounds(shape="uniform", max_keep=0.5))
    with pytest.raises(BudgetError, match="and shape uniform: at most"):
        keep_counts(alike(2), None, 0.95, Bounds(shape="uniform"))
