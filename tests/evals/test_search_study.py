"""The search study from end to end, small: every method, resumed, summarised."""

import json
import multiprocessing
import threading
import time

import pytest

from hipp_ext.allocators import ALLOCATORS
from hipp_ext.errors import CheckpointError, HippError
from hipp_ext.evals.studies.measuring import rank_correlation
from hipp_ext.evals.studies.search import control, study
from hipp_ext.evals.studies.search.methods import METHODS
from hipp_ext.evals.studies.search.study import (
    HIPP,
    INFORMED,
    UNTRAINED,
    StudySize,
    all_jobs,
    run_study,
)
from hipp_ext.evals.studies.search.summary import run

SIZE = StudySize(
    seeds=1,
    evaluations=12,
    questions=(12, 12),
    sensitivity_rows=8,
    front_plans=8,
    front_questions=6,
    table_questions=(16, 16),
)


@pytest.fixture
def few_answers(few_rows, monkeypatch):
    """Fewer preferences, and only those searches that can start from sensitivity, and random."""
    monkeypatch.setattr(study, "LATTICE_STEPS", 4)
    monkeypatch.setattr(study, "EDGE_RATIOS", (0.3, 0.5))
    for name in ("EvoPress", "NSGA-II"):
        monkeypatch.delitem(METHODS, name)
        monkeypatch.delitem(study.SEARCHES, name)


def test_a_small_study(tmp_path, few_answers):
    result = run(SIZE, tmp_path, processes=1)
    assert set(result["methods"]) == {*ALLOCATORS, *METHODS, *INFORMED, HIPP, UNTRAINED}
    for name, row in result["methods"].items():
        assert 0 < row["hypervolume"]["mean"] < 0.6, name
        assert (row["evaluations"] <= 12) and (
            row["evaluations"] > 6 or name in (*ALLOCATORS, UNTRAINED)
        )
        assert all(
            cell is None or 0 <= cell["mean"] <= 100
            for cells in row["table"].values()
            for cell in cells.values()
        )
    # Uniform pruning of a tenth leaves more right answers than of a half.
    uniform = result["methods"]["uniform"]["table"]["utility"]
    assert uniform["0.1"]["mean"] > uniform["0.5"]["mean"] + 10
    assert result["claims"]["hypervolume_gain_percent"]["over"] in METHODS
    assert result["claims"]["hypervolume_gain_percent_over_informed"]["over"] in INFORMED
    # Question by question, the same differences.
    for name, estimate in result["paired"].items():
        assert estimate["value"] == pytest.approx(
            result["claims"][f"{name}, points over"]["sensitivity"]["mean"], abs=1e-4
        )
        assert estimate["se"] >= 0 and estimate["low"] <= estimate["value"] <= estimate["high"]
    assert len(result["paired"]) == 10
    policy, archived = result["control"]["policy"], result["control"]["archived"]
    assert set(policy["swing_points_utility_minus_robustness_corner"]) == {"0.3", "0.5"}
    assert (
        len(policy["spearman"]) == 10 and len(archived["spearman"]) == 6
    )  # no archived plan has exactly a given budget
    assert policy["removed_percent_from_compression_to_robustness"][-1] < 30
    assert (
        1
        <= archived["lattice_distinct_plans"]["mean"]
        <= 12
        < policy["lattice_distinct_plans"]["mean"]
        <= 15
    )
    untrained = result["control"]["untrained"]
    assert (
        untrained["spearman"]["robustness-compression edge: compression"]["mean"] > 0.99
        and len(untrained["spearman"]) == 10
    )
    for who in (policy, archived):
        removed = who["removed_percent_from_compression_to_robustness"]
        assert (
            len(removed) == 5 and removed[0] >= removed[-1]
        )  # of twelve evaluated plans one may answer all
        assert 0 < who["lattice_distinct_nondominated_percent"]["mean"] <= 100
    assert (tmp_path / "search_12_12.png").read_bytes()[:4] == b"\x89PNG"

    done = json.loads((tmp_path / f"{HIPP}-0.json").read_text())
    (tmp_path / "uniform-0.json").unlink()
    again = {r["method"]: r for r in run_study(SIZE, tmp_path, all_jobs(SIZE), processes=1)}
    assert (
        again[HIPP] == done
        and again["uniform"]["table"]["utility"]["0.1"]["ScienceQA"] == uniform["0.1"]["mean"]
    )
    alone = control.run(SIZE, tmp_path, processes=1)  # from the same jobs
    assert (
        alone["control"] == {who: result["control"][who] for who in ("policy", "archived")}
        and alone["hypervolume"] == result["methods"][HIPP]["hypervolume"]
    )
    assert (tmp_path / "control.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(CheckpointError, match="holds another run: seeds is 1 there, and 2 was"):
        run_study(StudySize(seeds=2), tmp_path, [])


def test_a_process_that_is_killed_ends_the_study(tmp_path):
    def kill():
        while len(children := multiprocessing.active_children()) < 2:
            time.sleep(0.05)
        for child in children:  # one that is left would finish its start first
            child.kill()

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(HippError, match="the same command continues from there"):
        run_study(SIZE, tmp_path, [("uniform", 0), ("random", 0)], processes=2)


def test_what_is_constant_follows_nothing():
    assert (
        rank_correlation([1, 2, 3], [0.1, 0.2, 0.4]) == 1
        and rank_correlation([1, 2, 3], [0.5, 0.5, 0.5]) == 0
    )
