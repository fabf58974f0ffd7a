"""A plan survives the trip to a file and back; one that was damaged or edited into nonsense does
not load.
"""

import io
import json
import math
import os
import re
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_budget import group

from hipp_ext import PruningPlan
from hipp_ext.errors import OutputExistsError, PlanError
from hipp_ext.files.untrusted import MAX_COMMAND
from hipp_ext.plan import MAX_COMMANDS, PlanGroup
from hipp_ext.units import plan_from_counts


@st.composite
def plans(draw):
    groups = []
    for layer in range(draw(st.integers(1, 5))):
        for kind in draw(st.sampled_from([("attention",), ("ffn",), ("attention", "ffn")])):
            width = draw(st.integers(1, 60))
            kept = draw(st.sets(st.integers(0, width - 1), min_size=1))
            groups.append(
                PlanGroup(
                    tower="language",
                    layer=layer,
                    kind=kind,
                    width=width,
                    kept=tuple(sorted(kept)),
                    unit_parameters=draw(st.integers(1, 10**9)),
                )
            )
    notes = draw(
        st.dictionaries(
            st.text(max_size=9), st.integers(-9, 9) | st.text(max_size=9) | st.none(), max_size=3
        )
    )
    return PruningPlan(
        groups=tuple(groups), preference=(0.25, 0.25, 0.5), scorer="WandaSP", notes=notes
    )


@settings(deadline=None)
@given(plans())
def test_a_plan_equals_itself_after_json(plan):
    assert PruningPlan.from_json(plan.to_json()) == plan


@settings(deadline=None)
@given(plans())
def test_the_ratio_counts_parameters(plan):
    removed = sum((g.width - g.keep) * g.unit_parameters for g in plan.groups)
    assert plan.pruning_ratio == pytest.approx(
        removed / sum(g.width * g.unit_parameters for g in plan.groups)
    )


@pytest.fixture
def plan():
    kept = {"attention": (0, 1, 3), "ffn": (0, 1, 2, 5)}
    sizes = {"attention": (4, 100), "ffn": (7, 10)}
    return PruningPlan(
        groups=tuple(
            PlanGroup(
                tower="language",
                layer=0,
                kind=k,
                width=sizes[k][0],
                kept=kept[k],
                unit_parameters=sizes[k][1],
            )
            for k in kept
        )
    )


def test_the_file_is_short_and_readable(plan):
    assert '"keep": 4, "kept": "0-2,5"' in plan.to_json()


def test_a_notebook_shows_the_table_without_codes_of_a_terminal(plan):
    shown = plan.table()._repr_mimebundle_(include=(), exclude=())["text/plain"]
    rows = [line.split() for line in shown.splitlines()]
    bars = ["\u2588" * 8, "\u2588" * 6]
    assert ["language", "0", "3", "4", bars[0], "4", "7", bars[1]] in rows and "\x1b" not in shown


def test_a_row_of_the_table_is_a_layer_or_neighbours_that_are_alike():
    """80 layers of two blocks, three of them different, and a projector: at 80 columns."""

    def group(layer, kind, keep, width, tower="language"):
        parts = 2 if kind == "query_heads" else 1
        size, each = width // parts, keep // parts
        kept = tuple(part * size + unit for part in range(parts) for unit in range(each))
        return PlanGroup(
            tower=tower,
            layer=layer,
            kind=kind,
            width=width,
            kept=kept,
            unit_parameters=9,
            sections=parts,
        )

    groups = [group(0, "ffn", 100, 4096, "projector")]
    for layer in range(80):
        kind = "query_heads" if layer == 40 else "attention"
        groups.append(group(layer, kind, 6, 8))
        if layer != 70:  # left whole
            groups.append(group(layer, "ffn", 0 if layer == 7 else 20480, 28672))
    console = Console(width=80, file=io.StringIO())
    console.print(PruningPlan(groups=tuple(groups)).table())
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split()[:7] for line in lines if re.search(r"(language|projector) \d", line)]
    attention, ffn = ["6", "8", "\u2588" * 8], ["20480", "28672"]
    assert rows == [
        ["projector", "0", "-", "100", "4096"],
        ["language", "0-6", *attention, *ffn],
        ["language", "7", *attention, "0", "28672"],
        ["language", "8-69", *attention, *ffn],
        ["language", "70", *attention, "-"],
        ["language", "71-79", *attention, *ffn],
    ]
    assert any("query heads" in line for line in lines)


def test_commands_are_recorded_in_their_order(plan):
    assert plan.commands == () and plan.after("hipp plan a", "b").after("c").commands == (
        "hipp plan a",
        "b",
        "c",
    )
    noted = plan.replace(notes={"why": 1}).after("x")
    assert PruningPlan.from_json(noted.to_json()) == noted and noted.notes["why"] == 1
    for wrong in ("text", [1], ["x" * (MAX_COMMAND + 1)], ["x"] * (MAX_COMMANDS + 1), {"a": "b"}):
        assert plan.replace(notes={"commands": wrong}).commands == ()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_truncated_plan_does_not_load(data):
    text = data.draw(plans()).to_json().rstrip()
    with pytest.raises(PlanError, match="Not a pruning plan"):
        PruningPlan.from_json(text[: data.draw(st.integers(0, len(text) - 1))])


EDITS = {
    "keep says one thing, kept another": (
        lambda d: d["groups"][0].update(keep=2),
        "says keep 2 and names 3",
    ),
    "a ratio that is not the groups'": (
        lambda d: d.update(pruning_ratio=0.5),
        r"says pruning_ratio 0\.5, its groups say",
    ),
    "a unit beyond the width": (
        lambda d: d["groups"][0].update(kept="0-9"),
        "not below its width 4",
    ),
    "a huge range": (
        lambda d: d["groups"][0].update(kept="0-99999999999"),
        "not below its width 4",
    ),
    "units out of order": (lambda d: d["groups"][0].update(kept="3,0-1"), "distinct, sorted"),
    "a unit twice": (lambda d: d["groups"][0].update(kept="0-1,1"), "distinct, sorted"),
    "ranges that are none": (
        lambda d: d["groups"][0].update(kept="all"),
        "kept: String should match",
    ),
    "an unknown tower": (lambda d: d["groups"][0].update(tower="audio"), "tower: Input should be"),
    "a width as text": (
        lambda d: d["groups"][0].update(width="4"),
        "width: Input should be a valid integer",
    ),
    "a negative layer": (
        lambda d: d["groups"][0].update(layer=-1),
        "layer: Input should be greater",
    ),
    "a group twice": (lambda d: d.update(groups=[d["groups"][0]] * 2), "names a group twice"),
    "no groups": (lambda d: d.update(groups=[]), "at least one group"),
    "groups as an object": (lambda d: d.update(groups={}), "groups: Input should be a valid"),
    "a field nobody knows": (
        lambda d: d.update(pickle="gASV"),
        "pickle: Extra inputs are not permitted",
    ),
    "another format": (lambda d: d.update(format=2), "format: Input should be 1"),
    "NaN": (
        lambda d: d.update(pruning_ratio=float("nan")),
        "Not a pruning plan|says pruning_ratio nan",
    ),
}


def large(plan, **changes) -> str:
    """The plan with its groups replaced by what `changes` says of each, one for every value."""
    data = json.loads(plan.to_json())
    count = len(next(iter(changes.values())))
    data["groups"] = [
        data["groups"][1] | {"layer": i} | {k: v[i] for k, v in changes.items()}
        for i in range(count)
    ]
    return json.dumps(data)


BOMBS = {
    "one range again and again": (
        lambda p: large(p, width=[9_999_999], kept=[",".join(["0-9999998"] * 150)]),
        "distinct, sorted and below 9999999: 0-9999998 follows 9999998",
    ),
    "more kept than said": (
        lambda p: large(p, width=[9_999_999], kept=["0-9999998"]),
        "says keep 4 and names 9999999 kept",
    ),
    "wide groups": (
        lambda p: large(p, width=[9_999_999] * 20, keep=[9_999_999] * 20, kept=["0-9999998"] * 20),
        "its groups have 199999980 units, more than 10000000",
    ),
    "a range that runs backwards": (
        lambda p: large(p, kept=["5-2"]),
        "distinct, sorted and below 7",
    ),
    "many groups": (lambda p: large(p, layer=[0] * 30_000), "it has 30000 groups, more than 20000"),
    "the same groups many times": (
        lambda p: large(p, layer=[i // 2 for i in range(20_000)]),
        "names a group twice",
    ),
    "many fields": (
        lambda p: json.dumps(json.loads(p.to_json()) | {f"{i}": 0 for i in range(99)}),
        "more than 20 fields",
    ),
    "many empty groups": (lambda p: json.dumps({"groups": [{}] * 50_000}), "it has 50000 groups"),
    "a large file": (lambda p: " " * (33 << 20), "more than 33554432 bytes"),
    "nested lists": (
        lambda p: p.to_json().replace('"notes": {}', '"notes": ' + "[" * 100_000 + "]" * 100_000),
        "recursion",
    ),
    "a huge number": (
        lambda p: p.to_json().replace('"width": 4', '"width": ' + "9" * 100_000),
        "number out of range",
    ),
    "a preference as text": (
        lambda p: p.to_json().replace('"preference": null', '"preference": ["1", 0, 0]'),
        "valid number",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_takes_neither_memory_nor_time(plan, name):
    make, message = BOMBS[name]
    text, start, small = make(plan), time.process_time(), len(make(plan)) < 10_000
    if small:  # counting every allocation of the large ones takes longer than they do
        tracemalloc.start()
    try:
        with pytest.raises(PlanError, match=message):
            PruningPlan.from_json(text)
        peak = tracemalloc.get_traced_memory()[1] if small else 0
    finally:
        tracemalloc.stop()
    assert peak < 10 << 20 and time.process_time() - start < 5


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(PlanError, match="is no plan file"):
            PruningPlan.load(path)


def test_units_are_whole_numbers_of_whatever_type():
    entry = {
        "tower": "language",
        "layer": 0,
        "kind": "ffn",
        "width": np.int64(4),
        "unit_parameters": 10.0,
    }
    made = PruningPlan(groups=(PlanGroup(kept=np.array([0, 2]), **entry),))
    assert PruningPlan.from_json(made.to_json()) == made and '"kept": "0,2"' in made.to_json()
    for wrong in ({"kept": (0.5, 1)}, {"kept": ("0",)}, {"kept": (0,), "width": True}):
        with pytest.raises(PlanError, match="a whole number is needed"):
            PlanGroup(**({"kept": (0,)} | entry | wrong))


@pytest.mark.parametrize(
    "counts", [(2.5, 4), (True, 4), ("2", 4), (-1, 4), (9, 4), (4,), (math.nan, 4)]
)
def test_keep_counts_that_no_group_can_have_are_refused(counts):
    groups = tuple(group(i, "ffn", 7, 10) for i in range(2))
    scores = {g.name: torch.arange(7.0) for g in groups}
    with pytest.raises(PlanError, match=r"a whole number from 0 to 7|2 groups and 1 keep counts"):
        plan_from_counts(groups, counts, scores)
    assert plan_from_counts(groups, (2.0, np.int64(3)), scores).keep_counts == {
        "language.0.ffn": 2,
        "language.1.ffn": 3,
    }


@pytest.mark.parametrize("name", EDITS)
def test_a_hand_edited_plan_says_what_is_wrong(plan, name):
    edit, message = EDITS[name]
    data = json.loads(plan.to_json())
    edit(data)
    with pytest.raises(PlanError, match=message):
        PruningPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '"plan"', "\x00\xff", "{}", "\ud800"])
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
