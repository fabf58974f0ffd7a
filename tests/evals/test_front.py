"""`hipp front` on a planner that `hipp fit` wrote: the policy's plan is measured by the yardstick
of the fit, or not at all.
"""

import pytest
from command import hipp, hipp_json

from hipp_ext import HiPPPlanner, Preference, load_pruned
from hipp_ext.errors import CheckpointError, DataError, PreferenceError
from hipp_ext.testbed import WEIGHTS

FIT = (
    "fit",
    "testbed",
    "--steps",
    "1",
    "--questions",
    "12",
    "--robustness-on",
    "adversarial",
    "--cost",
    "flops",
    "--calibration-rows",
    "8",
    "-o",
)
PREFERENCE = ("-u", "0.3", "-r", "0.4", "-c", "0.3")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("front") / "planner"
    assert "12 plans evaluated" in hipp(*FIT, folder)
    return folder


def test_a_front_with_two_answers(fitted, tmp_path):
    ask = (
        "front",
        fitted,
        *PREFERENCE,
        "--model",
        "testbed",
        "--questions",
        "12",
        "--robustness-on",
        "adversarial",
    )
    out = hipp(*ask, "--picture", tmp_path / "front.png")
    assert (
        "non-dominated of 12 evaluated plans" in out
        and "best evaluated" in out
        and "not evaluated" not in out
    )
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"
    assert hipp_json("front", fitted)["front"]


@pytest.mark.parametrize(
    "other", [("--questions", "12"), ("--questions", "40", "--robustness-on", "adversarial")]
)
def test_other_questions_than_those_of_the_fit_are_refused(fitted, other):
    with pytest.raises(DataError, match="This is not what the plans of the fit were measured on"):
        hipp("front", fitted, *PREFERENCE, "--model", "testbed", *other)


def test_what_is_for_a_preference_needs_one(fitted):
    for option in (("--model", "testbed"), ("--pruning-ratio", "0.3")):
        with pytest.raises(PreferenceError, match="give -u, -r or -c"):
            hipp("front", fitted, *option)


def test_compression_counts_what_the_fit_rewarded(fitted):
    planner, model = HiPPPlanner.load(fitted), load_pruned(WEIGHTS)
    known = planner.answers(Preference(0.3, 0.4, 0.3)).best_evaluated
    now = planner.rewards(model, [known.plan], lambda _: {"utility": 0.0, "robustness": 0.0})[0]
    assert now.compression == pytest.approx(known.reward.compression)
    assert abs(now.compression - known.plan.pruning_ratio) > 0.005  # FLOPs, not parameters


def test_another_fit_in_the_same_place_is_refused(fitted):
    with pytest.raises(CheckpointError, match="holds another run: mrs is"):
        hipp(*FIT, fitted, "--mrs", "--overwrite")
