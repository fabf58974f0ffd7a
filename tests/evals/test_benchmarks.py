"""MME, AMBER and HallusionBench by hand, by their authors' arithmetic, and with errors that count
pictures.
"""

import math
import random

import pytest

from hipp_ext.evals import amber, mme
from hipp_ext.evals.amber import amber_scores
from hipp_ext.evals.benchmarks import BENCHMARKS, benchmark_of
from hipp_ext.evals.hallusionbench import hallusionbench_scores, places
from hipp_ext.evals.mme import SUBTASKS, mme_scores
from hipp_ext.evals.statistics import whole_groups

# --------------------------------------------------------------------------------------------- MME


def test_mme_by_hand():
    said = ["yes", "no", "yes", "yes", "yes", "unknown", "no", "yes"]
    labels = ["Yes", "No"] * 4
    subtasks = ["color"] * 4 + ["code_reasoning"] * 4
    scores = mme_scores(said, labels, subtasks, list("aabbaabb"), list("ppqqrrss"))
    assert list(scores) == ["overall", "perception", "cognition", "color", "code_reasoning"]
    color, code = scores["color"], scores["code_reasoning"]
    assert (color["accuracy"], color["accuracy_plus"], color["score"]) == (75, 50, 125)
    assert (code["accuracy"], code["accuracy_plus"], code["score"]) == (25, 0, 25)
    assert (code["yes_rate"], code["unknown_rate"]) == (50, 25)
    assert scores["perception"] == color and scores["cognition"]["score"] == 25
    whole = scores["overall"]
    assert (whole["score"], whole["accuracy"], whole["accuracy_plus"]) == (150, 50, 25)
    assert (whole["n"], whole["images"]) == (8, 4)


def test_mme_totals_are_sums_over_subtasks_and_yes_to_all_is_worth_a_quarter():
    subtasks = [name for name in SUBTASKS for _ in range(6)]
    pairs = [str(n // 2) for n in range(len(subtasks))]
    labels = ["Yes", "No"] * (len(subtasks) // 2)
    perfect = mme_scores([label.lower() for label in labels], labels, subtasks, pairs, pairs)
    assert (perfect["perception"]["score"], perfect["cognition"]["score"]) == (2000, 800)
    yes = mme_scores(["yes"] * len(labels), labels, subtasks, pairs, pairs)
    assert (yes["perception"]["score"], yes["cognition"]["score"]) == (500, 200)
    assert (yes["overall"]["accuracy"], yes["overall"]["accuracy_plus"]) == (50, 0)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("NO", "no"),
        ("yes, it is", "yes"),
        ("The answer is yes", "unknown"),
        ("Not so", "no"),
        ("", "unknown"),
    ],
)
def test_mmes_authors_read_four_characters(text, read):
    assert mme.official_answer(text) == read


# ------------------------------------------------------------------------------------------- AMBER


def by_the_authors(said: list[str], labels: list[str], epsilon: float) -> list[float]:
    """Accuracy, precision, recall and F1 as the authors' code computes them, with its constants."""
    pairs = list(zip(said, labels, strict=True))
    right = sum(a == label.lower() for a, label in pairs)
    right_no = sum(a == "no" and label == "No" for a, label in pairs)
    accuracy = round(right / (len(pairs) + 0.001) * 100, 1)
    precision = round(right_no / (said.count("no") + 0.001) * 100, 1)
    recall = round(right_no / (labels.count("No") + 0.001) * 100, 1)
    both = precision / 100 + recall / 100 + epsilon
    return [accuracy, precision, recall, round(2 * precision * recall / 100 / both, 1)]


def test_amber_is_its_authors_arithmetic():
    draw = random.Random(7)
    kinds = [kind for kind in amber.KINDS for _ in range(60)]
    labels = [
        "No" if "hallucination" in kind else draw.choice(["Yes", "No", "No"]) for kind in kinds
    ]
    said = [draw.choice(["yes", "no", "no", "unknown"]) for _ in kinds]
    splits = [amber.KINDS[kind] for kind in kinds]
    scores = amber_scores(said, labels, splits, [str(n // 5) for n in range(len(kinds))])
    assert list(scores) == ["overall", *amber.SPLITS]
    for split, own in scores.items():
        rows = [n for n, s in enumerate(splits) if split == "overall" or split in s]
        epsilon = 0.001 if split == "existence" else 0.0001
        theirs = by_the_authors([said[n] for n in rows], [labels[n] for n in rows], epsilon)
        ours = [own[name] for name in ("accuracy", "precision", "recall", "f1")]
        assert ours == pytest.approx(theirs, abs=0.2) and own["n"] == len(rows)
        for name in ("yes", "unknown"):
            rate = 100 * sum(said[n] == name for n in rows) / len(rows)
            assert own[f"{name}_rate"] == pytest.approx(rate)
    assert scores["existence"]["precision"] == 100  # nothing there is asked with the answer yes


def test_ambers_authors_take_the_exact_words_only():
    read = [amber.official_answer(text) for text in ("Yes", "No", "No.", "no", "Yes, there is", "")]
    assert read == ["yes", "no", "unknown", "unknown", "unknown", "unknown"]


def test_amber_without_an_answer_no_is_zero_and_no_error():
    (overall, *_) = amber_scores(["yes"] * 2, ["No"] * 2, [("existence",)] * 2, ["a", "b"]).values()
    assert [overall[name] for name in ("precision", "recall", "f1", "accuracy")] == [0, 0, 0, 0]


# ----------------------------------------------------------------------------------- HallusionBench


def test_hallusionbench_by_hand():
    index = "H_VD_math_0_{}_{}".format
    indices = [index(figure, question) for figure in (0, 1) for question in (0, 1)]
    indices += ["H_VS_map_0_1_0", "H_VS_map_0_2_0", "H_VS_map_1_1_0"]
    labels = ["Yes", "No", "No", "No", "Yes", "No", "Yes"]
    said = ["yes", "no", "yes", "no", "yes", "no", "unknown"]
    splits = [("VD", "VD_math")] * 4 + [("VS", "VS_map")] * 3
    scores = hallusionbench_scores(said, labels, splits, indices)
    math_, map_ = scores["VD_math"], scores["VS_map"]
    assert math_ == pytest.approx(scores["VD"], nan_ok=True)
    # figure 0 is right, figure 1 is not; question 1 is right about both, question 0 is not
    assert (math_["n"], math_["figures"], math_["pairs"]) == (4, 2, 2)
    assert (math_["accuracy"], math_["figure_accuracy"], math_["pair_accuracy"]) == (75, 50, 50)
    # set 1 of the maps has the numbers of set 0, and is another pair
    assert (map_["figures"], map_["pairs"], map_["pair_accuracy"]) == (3, 2, 50)
    assert map_["figure_accuracy"] == pytest.approx(200 / 3)
    overall = scores["overall"]
    assert (overall["figures"], overall["pairs"], overall["pair_accuracy"]) == (5, 4, 50)
    assert overall["unknown_rate"] == pytest.approx(100 / 7)
    assert math.isnan(math_["accuracy_se"]) and map_["accuracy_se"] > 0  # one set, two sets


def test_index_of_hallusionbench():
    assert places("HallusionBench_VD_math_3_1_0") == ("3", "1", "0")
    assert places("VD_math_3_1_0") is None


# ------------------------------------------------------------------------------------- all of them


def test_a_group_counts_once_and_whole():
    counts = whole_groups([True, False, True, True, True], list("abaac"))
    assert counts.tolist() == [[1, 1], [1, 0], [0, 0], [0, 0], [1, 1]]
    assert whole_groups([True] * 3, list("aab"), 2).tolist() == [[1, 1], [0, 0], [0, 0]]


def test_errors_are_over_pictures_and_not_over_questions():
    """The same questions asked twice about every picture tell nothing new."""
    draw = random.Random(3)
    pictures = [str(n) for n in range(40)]
    said, labels = ([draw.choice(["yes", "no"]) for _ in pictures] for _ in range(2))
    labels = [label.capitalize() for label in labels]
    once = amber_scores(said, labels, [("relation",)] * 40, pictures)["overall"]
    again = amber_scores(said * 4, labels * 4, [("relation",)] * 160, pictures * 4)["overall"]
    assert again["accuracy_se"] == pytest.approx(once["accuracy_se"])
    p = once["accuracy"]
    assert once["accuracy_se"] == pytest.approx(math.sqrt(p * (100 - p) / 40), rel=0.1)
    indices = [f"H_VD_math_{n}_{k}_0" for n in pictures for k in (0, 1)]
    sets = hallusionbench_scores(
        [one for one in said for _ in (0, 1)],
        [one for one in labels for _ in (0, 1)],
        [("VD", "VD_math")] * 80,
        indices,
    )["overall"]
    assert sets["accuracy"] == p and sets["pair_accuracy"] == p
    assert sets["accuracy_se"] == pytest.approx(once["accuracy_se"], rel=0.1)


def test_without_errors_the_numbers_are_the_same():
    arguments = ["yes", "no"], ["Yes", "No"], ["color"] * 2, ["a", "a"], ["p", "p"]
    bare = mme_scores(*arguments, errors=False)["color"]
    whole = mme_scores(*arguments)["color"]
    assert bare == {name: own for name, own in whole.items() if not name.endswith("_se")}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mme_scores(["yes"], ["Yes"], ["color"], ["a"], ["p"]), "two questions about"),
        (lambda: mme_scores(["yes"], ["Yes"], ["colour"], ["a"], ["p"]), "unknown subtasks"),
        (lambda: mme_scores([], [], [], [], []), "of one length, above 0"),
        (lambda: amber_scores(["yes"], ["Yes"], [], ["p"]), "of one length, above 0"),
        (lambda: hallusionbench_scores(["yes"], ["Yes"], [("VD",)], ["7"]), "'7' is no index"),
        (lambda: hallusionbench_scores([], [], [], []), "of one length, above 0"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rules_and_positive_answers():
    assert {name: one.positive for name, one in BENCHMARKS.items()} == {
        "MME": None,
        "AMBER": "no",
        "HallusionBench": None,
    }
    assert list(BENCHMARKS["HallusionBench"].rules) == ["vlmeval"]  # its authors let GPT-4 judge
    assert benchmark_of("mine").positive == benchmark_of("RePOPE").positive == "yes"
