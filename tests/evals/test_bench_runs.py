"""Benches that measure one thing, run for real and small: the figures mean little, their shape and signs are checked."""

import json

import pytest

from hipp_ext.errors import HippError
from hipp_ext.evals.studies import fit_cost, kill, knockout, mrs_cost, query, synflow
from hipp_ext.planner import FitSettings


def test_one_policy_call(few_rows):
    times = query.run(repeats=3)["query [ms]"]
    assert 0 < times["median"] <= times["most"] and times["n"] == 3


def test_cost_of_mrs_form_by_form():
    found = mrs_cost.run(rows=2, batch_size=2)
    assert found["modules"] == 12
    for form in ("worst", "grad", "removal", "attack"):
        assert found[f"{form}_share_of_epoch"] > 0 and found[f"{form}_peak_mib"] >= 0


def test_synflow_beside_what_was_measured(few_rows):
    found = synflow.run(plans=2)
    assert (
        all(-1 <= r["utility"] <= 1 for r in found["spearman_with_stability"].values())
        and found["plans_per_ratio"] == 2
    )
    assert 0 <= found["gate"]["sound_turned_away"] <= 1


def test_visual_sensitivity_finds_the_layers_that_knockout_finds():
    found = knockout.run()
    assert found["spearman"] > 0.7 > found["spearman_of_wanda_sp"]


def test_what_was_killed_once_ends_in_the_same_bytes():
    found = kill.run(kills=1, commands=("pope",))[
        "pope"
    ]  # a fit that was killed has a test beside the planner's
    assert found["same_bytes"] == 1 and not found["differing"] and found["files"] > 0


def test_what_cannot_be_killed_is_named():
    with pytest.raises(
        HippError, match=r"\['pop'\] cannot be killed here; the commands are prune, fit"
    ):
        kill.run(kills=1, commands=("pop",))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_fit_costs(dtype, tmp_path):
    size = fit_cost.FitCostSize(
        hidden=256, layers=2, questions=3, calibration=2, fit=FitSettings(steps=1, updates=2)
    )
    found = fit_cost.run(size, device="cpu", dtype=dtype, out=tmp_path / "cost.json")
    assert json.loads((tmp_path / "cost.json").read_text()) == found
    dense, pruned = found["evaluation, dense"], list(found["evaluation, pruned"].values())
    # Three rows as POPE asks them share a picture, three have one each; an addition and a multiplication a weight.
    least = 2 * (4 * 577 + 6 * 60) * found["parameters"]
    assert least < dense["teraflops"] * 1e12 < 1.35 * least
    assert found["activations_mib"] == 6 * 637 * 256 * (4 if dtype == "float32" else 2) / 2**20
    once = sum(
        found[part]["seconds"] for part in ("signals", "inputs of the language tower", "learning")
    )
    mean = sum(p["seconds"] for p in pruned) / len(pruned)
    assert found["hours of a fit"] * 3600 == pytest.approx(once + 12 * mean)
