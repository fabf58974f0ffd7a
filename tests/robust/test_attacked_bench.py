"""`hipp bench attacked` in small: what it keeps, what it reports, and that it goes on."""

import pytest

from hipp_ext.errors import OutputExistsError
from hipp_ext.evals.studies.attacked import run

SETTING = {"seeds": 1, "steps": 1, "questions": 8, "tested": 16, "ratios": (0.4,), "save": False}


def test_planners_are_compared_at_one_sparsity_and_a_stopped_bench_goes_on(tmp_path, few_rows):
    said: list[str] = []
    result = run(
        tmp_path, epsilon=8 / 255, say=said.append, objectives=("pope", "adaptive"), **SETTING
    )["at 0.4"]
    assert [line.split(":")[0] for line in said] == [
        "pope at 0.4, seed 0",
        "adaptive at 0.4, seed 0",
    ]
    assert all(0.4 <= r["removed"] < 0.42 and r["attacked"] <= r["pope"] for r in result["runs"])
    means, difference = result["means"], result["minus_pope"]["adaptive"]["attacked"]
    assert difference["n"] == 1
    assert difference["mean"] == pytest.approx(
        means["adaptive"]["attacked"]["mean"] - means["pope"]["attacked"]["mean"]
    )
    (
        tmp_path / "adaptive-0.4-0.json"
    ).unlink()  # the fit is in its folder, so only the measurement is repeated
    archive = tmp_path / "adaptive-0.4-0" / "archive.jsonl"
    before = archive.read_bytes()
    again = run(
        tmp_path, epsilon=8 / 255, say=said.append, objectives=("pope", "adaptive"), **SETTING
    )["at 0.4"]
    assert again == result and archive.read_bytes() == before
    with pytest.raises(OutputExistsError, match="another setting"):
        run(tmp_path, epsilon=4 / 255, **SETTING)
