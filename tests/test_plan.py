"""A plan survives the trip to a file and back; one that was damaged or edited into nonsense does not load."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipp_ext import PruningPlan
from hipp_ext.errors import OutputExistsError, PlanError
from hipp_ext.plan import PlanGroup


@st.composite
def plans(draw):
    groups = []
    for layer in range(draw(st.integers(1, 5))):
        for kind in draw(st.sampled_from([("attention",), ("ffn",), ("attention", "ffn")])):
            width = draw(st.integers(1, 60))
            kept = draw(st.sets(st.integers(0, width - 1), min_size=1))
            groups.append(
                PlanGroup(tower="language", layer=layer, kind=kind, width=width, kept=tuple(sorted(kept)),
                          unit_parameters=draw(st.integers(1, 10**9)))
            )  # fmt: skip
    notes = draw(st.dictionaries(st.text(max_size=9), st.integers(-9, 9) | st.text(max_size=9) | st.none(), max_size=3))
    return PruningPlan(groups=tuple(groups), preference=(0.25, 0.25, 0.5), scorer="WandaSP", notes=notes)


@settings(deadline=None)
@given(plans())
def test_a_plan_equals_itself_after_json(plan):
    assert PruningPlan.from_json(plan.to_json()) == plan


@settings(deadline=None)
@given(plans())
def test_the_ratio_counts_parameters(plan):
    removed = sum((g.width - g.keep) * g.unit_parameters for g in plan.groups)
    assert plan.pruning_ratio == pytest.approx(removed / sum(g.width * g.unit_parameters for g in plan.groups))


@pytest.fixture
def plan():
    kept = {"attention": (0, 1, 3), "ffn": (0, 1, 2, 5)}
    sizes = {"attention": (4, 100), "ffn": (7, 10)}
    return PruningPlan(
        groups=tuple(
            PlanGroup(tower="language", layer=0, kind=k, width=sizes[k][0], kept=kept[k], unit_parameters=sizes[k][1])
            for k in kept
        )
    )


def test_the_file_is_short_and_readable(plan):
    assert '"keep": 4, "kept": "0-2,5"' in plan.to_json()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_truncated_plan_does_not_load(data):
    text = data.draw(plans()).to_json().rstrip()
    with pytest.raises(PlanError, match="Not a pruning plan"):
        PruningPlan.from_json(text[: data.draw(st.integers(0, len(text) - 1))])


EDITS = {
    "keep says one thing, kept another": (lambda d: d["groups"][0].update(keep=2), "says keep 2 and names 3"),
    "a ratio that is not the groups'": (lambda d: d.update(pruning_ratio=0.5), r"says pruning_ratio 0\.5, its groups say"),
    "a unit beyond the width": (lambda d: d["groups"][0].update(kept="0-9"), "not below its width 4"),
    "a huge range": (lambda d: d["groups"][0].update(kept="0-99999999999"), "not below its width 4"),
    "units out of order": (lambda d: d["groups"][0].update(kept="3,0-1"), "distinct, sorted"),
    "a unit twice": (lambda d: d["groups"][0].update(kept="0-1,1"), "distinct, sorted"),
    "ranges that are none": (lambda d: d["groups"][0].update(kept="all"), "kept: String should match"),
    "an unknown tower": (lambda d: d["groups"][0].update(tower="audio"), "tower: Input should be"),
    "a width as text": (lambda d: d["groups"][0].update(width="4"), "width: Input should be a valid integer"),
    "a negative layer": (lambda d: d["groups"][0].update(layer=-1), "layer: Input should be greater"),
    "a group twice": (lambda d: d.update(groups=[d["groups"][0]] * 2), "names a group twice"),
    "no groups": (lambda d: d.update(groups=[]), "at least one group"),
    "groups as an object": (lambda d: d.update(groups={}), "groups: Input should be a valid"),
    "a field nobody knows": (lambda d: d.update(pickle="gASV"), "pickle: Extra inputs are not permitted"),
    "another format": (lambda d: d.update(format=2), "format: Input should be 1"),
    "NaN": (lambda d: d.update(pruning_ratio=float("nan")), "Not a pruning plan|says pruning_ratio nan"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_hand_edited_plan_says_what_is_wrong(plan, name):
    edit, message = EDITS[name]
    data = json.loads(plan.to_json())
    edit(data)
    with pytest.raises(PlanError, match=message):
        PruningPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '"plan"', "\x00\xff", "{}"])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(PlanError, match="Not a pruning plan"):
        PruningPlan.from_json(text)


def test_errors_name_the_file(plan, tmp_path):
    with pytest.raises(PlanError, match="There is no plan at .*missing.json"):
        PruningPlan.load(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(PlanError, match=r"bad\.json: Not a pruning plan"):
        PruningPlan.load(tmp_path / "bad.json")


def test_a_plan_file_is_not_overwritten_unasked(plan, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    with pytest.raises(OutputExistsError, match="exists"):
        plan.save(path)
    plan.replace(scorer="FLAP").save(path, overwrite=True)
    assert PruningPlan.load(path).scorer == "FLAP"
