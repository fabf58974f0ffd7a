"""POPE: our numbers are VLMEvalKit's for its rule, and the authors' for theirs; and the error bars are honest."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipp_ext.evals.pope import official_answer, pope_scores, vlmeval_answer
from hipp_ext.evals.statistics import binomial_se, clustered_se
from hipp_ext.integrations.vlmevalkit import _import_vlmeval

WORDS = [
    "Yes",
    "no",
    "No",
    "not",
    "NO.",
    "yes,",
    "no,yes",
    ". No",
    "3,4",
    "a.b",
    "nö",
    "はい",
    "oui",
    "...",
    "n't",
    "-",
    "\n",
]
ANSWERS = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join),
    st.lists(st.sampled_from(WORDS), max_size=6).map("".join),
    st.just("no" + ". " * 40 + "yes"),
)
SPLITS = st.lists(
    st.sampled_from(["random", "popular", "adversarial"]), min_size=1, max_size=3, unique=True
)
ROWS = st.lists(
    st.tuples(
        ANSWERS, st.sampled_from(["Yes", "No"]), SPLITS.map(",".join), st.sampled_from("abcd")
    ),
    min_size=1,
    max_size=25,
)


@pytest.fixture(scope="session")
def yorn():
    _import_vlmeval()
    import vlmeval.dataset.utils.yorn as yorn

    return yorn


def by_the_authors(text: str) -> str:
    """evaluate.py of the POPE repository, as it stands there."""
    if text.find(".") != -1:
        text = text.split(".")[0]
    text = text.replace(",", "")
    words = text.split(" ")
    if "No" in words or "not" in words or "no" in words:
        return "no"
    return "yes"


@pytest.mark.parametrize(
    "text, official, vlmeval",
    [
        ("Yes", "yes", "yes"),
        ("No", "no", "no"),
        ("yes.", "yes", "yes"),
        ("Yes, there is", "yes", "yes"),
        ("There is not a dog.", "no", "unknown"),
        ("", "yes", "unknown"),
        ("garbage", "yes", "unknown"),
        ("Yes, no", "no", "unknown"),
        ("YES. No", "yes", "unknown"),
        ("Nothing. No.", "yes", "no"),
        ("NO", "yes", "no"),
    ],
)
def test_the_rules_part_where_the_module_says(text, official, vlmeval):
    assert (official_answer(text), vlmeval_answer(text)) == (official, vlmeval)


@settings(max_examples=500, deadline=None)
@given(ANSWERS)
def test_rules_equal_their_sources(yorn, text):
    assert vlmeval_answer(text) == yorn.YOrN_Extraction(text).lower()
    assert official_answer(text) == by_the_authors(text)


@settings(max_examples=40, deadline=None)
@given(ROWS)
def test_scores_equal_vlmevalkit(yorn, tmp_path_factory, rows):
    answers, labels, categories, images = (list(column) for column in zip(*rows, strict=True))
    frame = pd.DataFrame({"index": range(len(rows)), "answer": labels, "category": categories})
    frame["extracted"] = [yorn.YOrN_Extraction(answer) for answer in answers]
    frame["score"] = frame["answer"] == frame["extracted"]
    file = tmp_path_factory.mktemp("pope") / "matched.pkl"
    frame.to_pickle(file)
    theirs = yorn.POPE_rating(str(file)).set_index("split").rename(index={"Overall": "overall"})
    ours = pope_scores(answers, labels, categories, images, resamples=10)["vlmeval"]
    assert set(theirs.index) == set(ours)
    for split, scores in ours.items():
        expected = theirs.loc[split, ["Overall", "acc", "precision", "recall"]].tolist()
        assert [scores.f1, scores.accuracy, scores.precision, scores.recall] == pytest.approx(
            expected
        )


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_official_scores_equal_the_authors_formulas(rows):
    ours = pope_scores(*(list(column) for column in zip(*rows, strict=True)), resamples=10)[
        "official"
    ]
    for split, scores in ours.items():
        pairs = [
            (by_the_authors(a), label.lower())
            for a, label, c, _ in rows
            for one in c.split(",")
            if split in ("overall", one)
        ]
        tp, tn = pairs.count(("yes", "yes")), pairs.count(("no", "no"))
        fp, fn = pairs.count(("yes", "no")), pairs.count(("no", "yes"))
        precision, recall = tp / (tp + fp) if tp + fp else 0, tp / (tp + fn) if tp + fn else 0
        f1 = 2 * precision * recall / (precision + recall) if tp else 0
        assert scores.n == len(pairs) == tp + tn + fp + fn
        assert scores.unknown_rate == 0
        assert [
            scores.accuracy,
            scores.precision,
            scores.recall,
            scores.f1,
            scores.yes_rate,
        ] == pytest.approx(
            [
                100 * (tp + tn) / len(pairs),
                100 * precision,
                100 * recall,
                100 * f1,
                100 * (tp + fp) / len(pairs),
            ]
        )


def test_a_broken_model_scores_two_thirds_or_nothing():
    labels = ["Yes", "No"] * 6
    scores = pope_scores([""] * 12, labels, ["random"] * 12, [str(n // 3) for n in range(12)])
    official, vlmeval = scores["official"]["overall"], scores["vlmeval"]["overall"]
    assert official.f1 == pytest.approx(200 / 3)
    assert (official.accuracy, official.yes_rate, official.unknown_rate) == (50, 100, 0)
    assert (vlmeval.f1, vlmeval.accuracy, vlmeval.yes_rate, vlmeval.unknown_rate) == (0, 0, 0, 100)


def test_pope_refuses_malformed_tables():
    with pytest.raises(ValueError, match=r"one length, above 0; got \[0, 0, 0, 0\]"):
        pope_scores([], [], [], [])
    with pytest.raises(ValueError, match=r"got \[2, 1, 1, 1\]"):
        pope_scores(["yes", "no"], ["Yes"], ["random"], ["a"])
    with pytest.raises(ValueError, match=r"Yes or No, not \['yes'\]"):
        pope_scores(["yes"], ["yes"], ["random"], ["a"])


def test_clustered_se_is_the_textbook_value_and_counts_clusters():
    rng = np.random.default_rng(3)
    hits = rng.integers(0, 2, 400).astype(float)

    def mean(sums):
        return sums[..., :1] / sums[..., 1:]

    counts = np.stack([hits, np.ones(400)], axis=1)
    alone = clustered_se(counts, [str(n) for n in range(400)], mean, resamples=4000)[0]
    assert alone == pytest.approx(math.sqrt(hits.var() / 400), rel=0.05)
    assert 100 * alone == pytest.approx(binomial_se(100 * hits.mean(), 400), rel=0.05)
    fourfold, clusters = np.repeat(counts, 4, axis=0), [str(n // 4) for n in range(1600)]
    together = clustered_se(fourfold, clusters, mean, resamples=4000)[0]
    assert together == pytest.approx(alone, rel=1e-9)  # copies of a row add no evidence
    assert (
        together
        > 1.8 * clustered_se(fourfold, [str(n) for n in range(1600)], mean, resamples=4000)[0]
    )


def test_standard_errors_are_seeded_and_undefined_for_one_image():
    rows = (
        ["yes", "no", "no"] * 4,
        ["Yes", "No", "Yes"] * 4,
        ["random"] * 12,
        [str(n // 2) for n in range(12)],
    )
    first = pope_scores(*rows, seed=1)["vlmeval"]["overall"]
    assert first == pope_scores(*rows, seed=1)["vlmeval"]["overall"]
    assert first.f1_se != pope_scores(*rows, seed=2)["vlmeval"]["overall"].f1_se
    assert first.f1_se > 0 and first.accuracy_se > 0
    assert math.isnan(pope_scores(*rows[:3], ["one"] * 12)["vlmeval"]["overall"].f1_se)
    assert math.isnan(binomial_se(0, 0))


def test_clustered_se_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="2 rows of counts, but 1 clusters"):
        clustered_se(np.ones((2, 1)), ["a"], lambda sums: sums)
    with pytest.raises(ValueError, match="resamples must be at least 2, not 1"):
        clustered_se(np.ones((1, 1)), ["a"], lambda sums: sums, resamples=1)
