"""Studies that measure one thing, run for real and small."""

import json

import pytest

from hipp_ext.evals.studies import fit_cost, knockout, recovery_cost
from hipp_ext.planner import FitSettings


def test_visual_sensitivity_finds_the_layers_that_knockout_finds(monkeypatch):
    monkeypatch.setattr(knockout, "BATCHES", 2)
    found = knockout.run()
    assert found["spearman"] > 0.7 > found["spearman_of_wanda_sp"] and found["rows"] == 64


def test_what_a_fit_costs(tmp_path):
    size = fit_cost.FitCostSize(
        hidden=256, layers=2, questions=3, calibration=2, fit=FitSettings(steps=1, updates=2)
    )
    found = fit_cost.run(size, device="cpu", dtype="bfloat16", out=tmp_path / "cost.json")
    assert json.loads((tmp_path / "cost.json").read_text()) == found
    dense, pruned = found["evaluation, dense"], list(found["evaluation, pruned"].values())
    # Three rows as POPE asks them share a picture, three have one each; an addition and a
    # multiplication a weight.
    least = 2 * (4 * 577 + 6 * 60) * found["parameters"]
    assert least < dense["teraflops"] * 1e12 < 1.35 * least
    assert found["activations_mib"] == 6 * 637 * 256 * 2 / 2**20
    once = sum(
        found[part]["seconds"] for part in ("signals", "inputs of the language tower", "learning")
    )
    mean = sum(p["seconds"] for p in pruned) / len(pruned)
    assert found["hours of a fit"] * 3600 == pytest.approx(once + 12 * mean)


def test_what_a_recovery_costs(tmp_path):
    size = recovery_cost.RecoveryCostSize(hidden=256, layers=2, rows=1, steps=2)
    found = recovery_cost.run(size, device="cpu", dtype="bfloat16", out=tmp_path / "cost.json")
    assert json.loads((tmp_path / "cost.json").read_text()) == found
    assert 0.7 < found["student_parameters"] / found["teacher_parameters"] < 1
    for mode in ("full", "lora"):
        one = found[mode]
        assert one["tokens_per_second"] == pytest.approx(637 / one["seconds"])
        assert one["learnt_tokens_per_second"] == pytest.approx(60 / one["seconds"])
        assert 0 < one["least_seconds"] <= one["seconds"] <= one["most_seconds"]
        assert one["peak_mib"] > 100
