"""Two plans, one after the other, are one plan of the dense model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, build
from plans import dropping_plan, logits, query_plan, random_plan

from hipp_ext import load_pruned, masked, prune, save_pruned
from hipp_ext.errors import PlanError
from hipp_ext.groups import tower_layers
from hipp_ext.surgery.compose import compose
from hipp_ext.surgery.masks import zero_units

EVERYTHING = ("language", "vision", "projector")


def twice(model, first, make_second):
    """What two prunings leave, and what one by the composed plan leaves."""
    once = prune(model, first)
    second = make_second(once)
    total = compose(first, second, len(tower_layers(once, "language")))
    small = prune(once, second)
    assert small.hipp_plan == total
    return small, prune(model, total), total


def equal(one, other) -> bool:
    mine, its = one.state_dict(), other.state_dict()
    return mine.keys() == its.keys() and all(torch.equal(mine[n], its[n]) for n in mine)


@settings(max_examples=6, deadline=None)
@given(
    family=st.sampled_from(["llava_gqa", "qwen2_5_vl", "gemma3", "gemma3n", "mllama"]),
    ratios=st.tuples(st.floats(0, 0.4), st.floats(0, 0.4)),
    seed=st.integers(0, 99),
)
def test_two_prunings_are_one(family, ratios, seed):
    model = build(family)
    first = random_plan(model, ratios[0], seed)
    small, direct, total = twice(model, first, lambda m: random_plan(m, ratios[1], seed + 1))
    assert equal(small, direct)
    assert torch.equal(logits(small, batch(family)), logits(direct, batch(family)))
    left = (1 - first.pruning_ratio) * (1 - ratios[1])
    assert 1 - total.pruning_ratio == pytest.approx(left, abs=0.1)
    assert {g.name: g.width for g in total.groups} == {g.name: g.width for g in first.groups}


def test_query_heads():
    model = build("llava_gqa")
    first = query_plan(model, steps=(2, 3))
    small, direct, total = twice(model, first, lambda m: query_plan(m, 2, (1, 2)))
    assert equal(small, direct) and total.attention_unit == "query"


@pytest.mark.parametrize("drop", [False, True])
def test_query_heads_that_are_left_alone_with_their_keys(drop):
    """They are KV groups from then on, of which all or none stay."""
    model = build("llava_gqa")
    lost = ("language.1.attention",) if drop else ()
    small, direct, total = twice(
        model,
        query_plan(model, steps=(1, 4)),
        lambda m: dropping_plan(m, *lost, half=("language.1.ffn",)),
    )
    assert equal(small, direct)
    assert total.keep_counts["language.1.query_heads"] == (0 if drop else 2)


@pytest.mark.parametrize(
    ("first", "second"),
    [(("language",), EVERYTHING), (EVERYTHING, ("vision",)), (("vision",), ("language",))],
)
def test_towers_that_one_of_the_plans_leaves_alone(first, second):
    model = build("qwen2_5_vl")
    one = random_plan(model, 0.3, towers=first)
    small, direct, total = twice(model, one, lambda m: random_plan(m, 0.3, 1, towers=second))
    assert equal(small, direct) and set(total.towers) == {*first, *second}


@pytest.mark.parametrize("family", ["llava", "mllama", "smolvlm"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("0.attention", "0.ffn"), ("0.ffn",)),  # the layer is gone, and 1 is 0 now
        (("0.attention", "0.ffn"), ("0.attention", "0.ffn")),
        (("1.attention",), ("1.ffn",)),  # the layer goes with its second block
        (("1.attention", "1.ffn"), ("0.attention",)),
        (("0.ffn",), ("1.attention", "1.ffn")),
    ],
)
def test_blocks_and_layers_that_are_gone(family, first, second, tmp_path):
    model = build(family)
    plans = [[f"language.{name}" for name in names] for names in (first, second)]
    small, direct, total = twice(
        model,
        dropping_plan(model, *plans[0], half=("language.2.ffn",)),
        lambda m: dropping_plan(m, *plans[1], half=("language.1.ffn", "language.2.ffn")),
    )
    assert equal(small, direct)
    with masked(model, total):
        assert torch.allclose(
            logits(small, batch(family)), logits(model, batch(family)), rtol=1e-4, atol=1e-4
        )
    if family == "llava":
        save_pruned(small, tmp_path / "small", processor=None)
        loaded = load_pruned(tmp_path / "small")
        assert loaded.hipp_plan == total and equal(loaded, small)


def test_plans_that_do_not_follow_each_other():
    model = build("llava_gqa")
    first = random_plan(model, 0.3)
    small = prune(model, first)
    with pytest.raises(
        PlanError,
        match=r"language\.0\.attention: the first plan leaves 1 units.*prunes language\.0",
    ):
        compose(first, random_plan(model, 0.3), 3)
    with pytest.raises(PlanError, match=r"prunes language\.\d\.query_heads, .*of other units"):
        compose(first, query_plan(small), 3)
    second = random_plan(small)
    gone = dropping_plan(model, "language.1.attention")
    with pytest.raises(PlanError, match=r"leaves nothing: \['language.1.attention'\]"):
        compose(gone, dropping_plan(model), 3)
    fewer = second.replace(groups=second.groups[1:])
    with pytest.raises(PlanError, match=r"language\.0\.attention: .*no group for them"):
        compose(first, fewer, 3)


def test_a_plan_that_cannot_be_composed_stands_alone():
    """As after units were set to zero, or where the units are others."""
    model = build("llava_gqa")
    zeroed = build("llava_gqa")
    zero_units(zeroed, random_plan(model, 0.3))
    plan = random_plan(model, 0.5, 1)
    assert prune(zeroed, plan).hipp_plan == plan
    small = prune(model, random_plan(model, 0.3))
    other = query_plan(small)
    assert prune(small, other).hipp_plan == other
