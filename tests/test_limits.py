"""Limits of memory and latency, and the table of latencies that the second one reads."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, build

from hipp_ext import HiPPPlanner, Preference, prune
from hipp_ext.allocators import Sensitivity, Uniform
from hipp_ext.budget import Bounds
from hipp_ext.errors import BudgetError, DataError
from hipp_ext.groups import find_groups
from hipp_ext.latency_table import LatencyTable, Run, Times, block_times
from hipp_ext.limits import Limits, weight_bytes
from hipp_ext.scorers import Magnitude

MODEL = build("llama")
GROUPS = find_groups(MODEL)
WIDTHS = {g.kind: g.width for g in GROUPS}


def table(rest=1.0, head=0.5, channel=0.01) -> LatencyTable:
    blocks = {
        "attention": [(1, head + 0.1), (WIDTHS["attention"], head * WIDTHS["attention"] + 0.1)],
        "ffn": [(4, 4 * channel), (WIDTHS["ffn"], channel * WIDTHS["ffn"])],
    }
    times = Times(rest_ms=rest, blocks=blocks)
    return LatencyTable(
        runtime="here", conditions={"threads": 1}, layers=3, decode=times, prefill=times
    )


@settings(max_examples=50, deadline=None)
@given(
    st.floats(0, 9), st.floats(0, 2), st.floats(0.01, 1), st.floats(0.001, 0.1), st.integers(2, 40)
)
def test_the_times_of_blocks_are_found_from_those_of_models(rest, launch, head, channel, layers):
    def run(heads=8, channels=100, n=layers) -> Run:
        ms = rest + n * (launch + heads * head + channels * channel)
        return Run(widths={"attention": heads, "ffn": channels}, layers=n, ms=ms)

    runs = [run(), run(n=layers - 1), run(heads=4), run(heads=1), run(channels=50), run(channels=9)]
    times = block_times(runs)
    assert times.rest_ms == pytest.approx(rest, abs=1e-6 * runs[0].ms)
    for kind, unit, counts in (("attention", head, (1, 3, 8)), ("ffn", channel, (1, 9, 70))):
        found = times.of_block(kind, np.array([0, *counts]))
        expected = [0.0, *(launch / 2 + unit * n for n in counts)]
        assert found == pytest.approx(np.array(expected), abs=1e-6 * runs[0].ms)


def test_a_table_is_written_and_read(tmp_path):
    table().save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table()
    dense = table().latency(GROUPS, [g.width for g in GROUPS], "decode")
    assert dense == pytest.approx(table().dense_ms("decode"))
    assert table().latency(GROUPS, [0] * len(GROUPS), "decode") == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format"),
        ({"layers": 0}, "layers"),
        ({"decode": {"rest_ms": -1, "blocks": {}}}, "rest_ms"),
        ({"decode": {"rest_ms": 1, "blocks": {"ffn": [[1, 2.0]]}}}, "blocks.ffn"),
        ({"decode": {"rest_ms": 1, "blocks": {"ffn": [[5, 2.0], [5, 3.0]]}}}, "ascending"),
        ({"more": 1}, "more"),
    ],
)
def test_what_is_no_table_is_refused(change, message, tmp_path):
    values = json.loads(table().model_dump_json()) | change
    (tmp_path / "table.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=f"no latency table.*{message}"):
        LatencyTable.load(tmp_path / "table.json")
    with pytest.raises(DataError, match="No such file"):
        LatencyTable.load(tmp_path / "nothing.json")


def test_a_table_of_another_model_is_refused():
    limits = Limits(max_latency_ms=1.0, latency=table().model_copy(update={"layers": 4}))
    with pytest.raises(BudgetError, match="a model of 4 layers"):
        Uniform(pruning_ratio=0.0, scorer=Magnitude()).plan(MODEL, limits=limits)
    narrow = replace(GROUPS[0], width=2)
    with pytest.raises(BudgetError, match="this one has 3 layers"):
        table().check([narrow, *GROUPS[1:]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_memory_mb": 0}, "above 0"),
        ({"max_latency_ms": float("nan")}, "above 0"),
        ({"max_latency_ms": 3.0}, "needs a table"),
    ],
)
def test_wrong_limits_are_refused(options, message):
    with pytest.raises(BudgetError, match=message):
        Limits(**options)


@pytest.mark.parametrize("shape", ["free", "uniform", "layers"])
def test_a_plan_keeps_a_limit_of_memory_and_uses_it(shape):
    bounds = Bounds(shape=shape)
    dense = weight_bytes(MODEL)
    limit = 0.8 * dense / 1e6
    for maker in (
        Uniform(pruning_ratio=0.0, scorer=Magnitude(), bounds=bounds),
        Sensitivity(pruning_ratio=0.05, bounds=bounds, effort="fisher"),
        HiPPPlanner(Preference(1, 1, 0), bounds=bounds, effort="fisher", cache=None),
    ):
        plan = maker.plan(MODEL, calibration=[batch("llama")], limits=Limits(max_memory_mb=limit))
        left = weight_bytes(prune(MODEL, plan)) / 1e6
        assert left <= limit
        if shape == "free":
            assert left > 0.9 * limit
    with pytest.raises(BudgetError, match="Even the smallest plan .* MB of 0.001 MB"):
        maker.plan(MODEL, calibration=[batch("llama")], limits=Limits(max_memory_mb=1e-3))


def test_a_plan_keeps_a_limit_of_latency_and_removes_no_more_than_it_needs():
    limit = 0.7 * table().dense_ms("decode")
    limits = Limits(max_latency_ms=limit, latency=table())
    plan = Uniform(pruning_ratio=0.0, scorer=Magnitude()).plan(MODEL, limits=limits)
    time = table().latency(GROUPS, [g.keep for g in plan.groups], "decode")
    assert 0.97 * limit < time <= limit
    more = Uniform(pruning_ratio=0.6, scorer=Magnitude())
    assert more.plan(MODEL, limits=limits) == more.plan(MODEL)
    with pytest.raises(BudgetError, match="ms in here"):
        more.plan(MODEL, limits=replace(limits, max_latency_ms=0.9))
