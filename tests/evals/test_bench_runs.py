"""Benches that measure one thing, run for real and small: the figures mean little, their shape and signs are checked."""

from hipp_ext.evals.bench import kill, knockout, mrs_cost, query, synflow


def test_one_policy_call():
    times = query.run(repeats=3)["query [ms]"]
    assert 0 < times["median"] <= times["most"] and times["n"] == 3


def test_cost_of_mrs_form_by_form():
    found = mrs_cost.run(rows=4, batch_size=4)
    assert found["modules"] == 12
    for form in ("worst", "grad", "removal", "attack"):
        assert found[f"{form}_share_of_epoch"] > 0 and found[f"{form}_peak_mib"] >= 0


def test_synflow_beside_what_was_measured():
    found = synflow.run(plans=3)
    assert all(-1 <= r["utility"] <= 1 for r in found["spearman_with_stability"].values()) and found["plans_per_ratio"] == 3
    assert 0 <= found["gate"]["sound_turned_away"] <= 1


def test_visual_sensitivity_finds_the_layers_that_knockout_finds():
    found = knockout.run()
    assert found["spearman"] > 0.7 > found["spearman_of_wanda_sp"]


def test_a_fit_killed_once_ends_with_the_same_archive():
    found = kill.run(kills=1)
    assert found["same_archive_and_policy"] == found["kills"] == 1
