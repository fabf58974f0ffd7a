"""ScienceQA: option letters and accuracies are those of VLMEvalKit's exact matching."""

import math

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipp_ext.evals.scienceqa import option_letter, scienceqa_scores
from hipp_ext.integrations.vlmevalkit import _import_vlmeval

TEXTS = st.one_of(
    st.sampled_from(["red", "Blue", "a", "nan", "GREEN", "İ", "red square", 5, 2.0]),
    st.text(max_size=8),
)
OPTIONS = st.integers(2, 5).flatmap(
    lambda n: st.fixed_dictionaries({letter: TEXTS for letter in "ABCDE"[:n]})
)
WORDS = [
    "A",
    "A.",
    "(B)",
    "C,",
    "Z",
    "a",
    "red",
    "blue",
    "5",
    "is",
    "the",
    "Answer:",
    "Cannot determine the answer",
    "Failed to obtain answer via API",
    "正解は",
    "B\n",
    "D E",
]
ANSWERS = st.one_of(
    st.text(max_size=20), st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
)


@pytest.fixture(scope="session")
def theirs():
    _import_vlmeval()
    from vlmeval.dataset.utils import multiple_choice

    return multiple_choice


@settings(max_examples=800, deadline=None)
@given(ANSWERS, OPTIONS)
def test_letters_equal_vlmevalkit(theirs, answer, options):
    expected = (
        theirs.can_infer(answer, dict(options)) or "Z"
    )  # a copy: VLMEvalKit lowers the texts in place
    assert option_letter(answer, options) == expected


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("A", "A"),
        ("A.", "A"),
        ("(B)", "B"),
        ("Answer: A", "A"),
        ("B. purple", "B"),
        ("It is green", "C"),
        ("RED", "A"),
        ("A red square", "A"),
        ("B is the right one", "Z"),
        ("is B the right one", "B"),
        ("A or B", "Z"),
        ("", "Z"),
        ("red and green", "Z"),
        ("Z", "Z"),
    ],
)
def test_letters_by_hand(answer, letter):
    assert (
        option_letter(
            answer, {"A": "red", "B": "purple", "C": "Green", "D": "a colour not in the list"}
        )
        == letter
    )


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(ANSWERS, OPTIONS, st.sampled_from(["physics", "biology"]), st.booleans()),
        min_size=1,
        max_size=15,
    )
)
def test_accuracies_equal_vlmevalkit(theirs, rows):
    answers, options, categories, first = (list(column) for column in zip(*rows, strict=True))
    labels = ["A" if one else "B" for one in first]
    hits = [
        theirs.eval_vanilla(None, {"prediction": a, "question": "?", "GT": label, **choice})["hit"]
        for a, label, choice in zip(answers, labels, options, strict=True)
    ]
    expected = theirs.report_acc(pd.DataFrame({"hit": hits, "category": categories})).iloc[0]
    ours = scienceqa_scores(answers, labels, options, {"category": categories})
    assert ours["overall"].accuracy == pytest.approx(100 * expected["Overall"])
    for category in set(categories):
        own = ours[f"category={category}"]
        assert own.accuracy == pytest.approx(100 * expected[category])
        assert own.n == categories.count(category)
        p = own.accuracy / 100
        assert own.accuracy_se == pytest.approx(100 * math.sqrt(p * (1 - p) / own.n))


def test_unreadable_answers_are_counted():
    options = [{"A": "red", "B": "blue"}] * 4
    scores = scienceqa_scores(["A", "", "mist", "B"], ["A"] * 4, options)["overall"]
    assert (scores.n, scores.accuracy, scores.unknown_rate) == (4, 25, 50)
    assert scores.accuracy_se == pytest.approx(21.65, abs=0.01)


def test_scienceqa_refuses_malformed_tables():
    with pytest.raises(ValueError, match=r"one length, above 0; got \[0, 0, 0\]"):
        scienceqa_scores([], [], [])
    with pytest.raises(ValueError, match=r"got \[1, 1, 1, 2\]"):
        scienceqa_scores(["A"], ["A"], [{"A": "red"}], {"category": ["x", "y"]})
    with pytest.raises(
        ValueError, match=r"question 0: the answer 'D' is not one of the options \['A', 'B'\]"
    ):
        scienceqa_scores(["A"], ["D"], [{"A": "red", "B": "blue"}])
