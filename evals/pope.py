"""POPE: does the model see objects that are not there? Answers in, percentages with error bars out.

Two rules turn a free answer into yes or no. They differ on the answers of a broken model:

- The authors' rule reads every answer without a "no" as a yes. An empty or garbled answer is a yes,
  and a model that answers nothing at all scores F1 66.7.
- VLMEvalKit's rule needs exactly one of the words "yes" and "no". Any other answer is unknown:
  wrong in the accuracy, and a no in the F1. The same model scores 0.

Both are always reported side by side, with the share of yes and of unknown answers.

Source: arXiv 2305.10355, section 5 (the metrics), and evaluate.py of the authors' repository (the
rule).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hipp_ext.evals.statistics import rates_with_errors, ratio

SPLITS = ("random", "popular", "adversarial")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_LONE_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
# VLMEvalKit passes re.UNICODE (32) as the count of sub(). It is kept, to give the same numbers.
_MAX_REMOVED_PERIODS = 32


def official_answer(text: str) -> str:
    """ "yes" or "no" by the POPE authors' rule: no if the first sentence has the word No, not or
    no, else yes.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def vlmeval_answer(text: str) -> str:
    """ "yes" or "no" if exactly one of the two is a word of the answer, else "unknown":
    VLMEvalKit's rule.
    """
    text = text.lower()
    stripped = text
    for mark in _PUNCTUATION:
        alone = mark + " " in text or " " + mark in text or _DIGIT_COMMA.search(text)
        stripped = stripped.replace(mark, "" if alone else " ")
    words = _LONE_PERIOD.sub("", stripped, count=_MAX_REMOVED_PERIODS).split()
    if ("yes" in words) == ("no" in words):
        return "unknown"
    return "yes" if "yes" in words else "no"


RULES = {"vlmeval": vlmeval_answer, "official": official_answer}


@dataclass(frozen=True, kw_only=True)
class POPEScores:
    """Scores of one split by one rule. Rates and their standard errors (`_se`) are percentages, [0,
    100].

    Attributes:
        n: number of questions. In "overall" a question that belongs to several splits counts once
            for each, as in VLMEvalKit.
        images: number of distinct images, over which the standard errors are computed. They are NaN
            for one image.
        accuracy: share of correct answers; an unknown answer is wrong. Higher is better, as for
            precision, recall and f1.
        precision: share of the answers yes that are correct; 0 if there is none.
        recall: share of the questions with the label yes that are answered yes; 0 if there is none.
        f1: harmonic mean of precision and recall; 0 if both are 0.
        yes_rate: share of the answers yes. It is near 50 for a model that uses the image, since the
            labels are balanced.
        unknown_rate: share of answers that the rule cannot read; always 0 by the authors' rule.
    """

    n: int
    images: int
    accuracy: float
    accuracy_se: float
    precision: float
    precision_se: float
    recall: float
    recall_se: float
    f1: float
    f1_se: float
    yes_rate: float
    yes_rate_se: float
    unknown_rate: float
    unknown_rate_se: float


_RATES = ("accuracy", "precision", "recall", "f1", "yes_rate", "unknown_rate")


def pope_scores(
    answers: Sequence[str],
    labels: Sequence[str],
    categories: Sequence[str],
    images: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, dict[str, POPEScores]]:
    """Scores by rule ("vlmeval", "official") and split ("overall" first), in percent.

    Args:
        answers: answer of the model to each question.
        labels: "Yes" or "No" for each question.
        categories: comma-separated splits of each question, such as "random,popular".
        images: any text that identifies the image of each question.
        seed: random seed of the bootstrap over images, which gives the standard errors.
        resamples: number of bootstrap resamples.

    Raises:
        ValueError: the sequences differ in length, are empty, or hold a label that is not Yes or
            No.
    """
    if not len(answers) == len(labels) == len(categories) == len(images) > 0:
        lengths = [len(answers), len(labels), len(categories), len(images)]
        raise ValueError(
            "POPE needs answers, labels, categories and images of one length, above 0; got "
            f"{lengths}"
        )
    if wrong := set(labels) - {"Yes", "No"}:
        raise ValueError(f"POPE labels are Yes or No, not {sorted(map(str, wrong))[:3]}")
    splits: dict[str, list[int]] = {"overall": []}
    for row, category in enumerate(categories):
        for split in category.split(","):
            splits.setdefault(split, []).append(row)
            splits["overall"].append(row)
    scores = {}
    for name, rule in RULES.items():
        counts = _counts([rule(answer) for answer in answers], labels)
        scores[name] = {
            split: _scores(counts[rows], [images[row] for row in rows], seed, resamples)
            for split, rows in splits.items()
        }
    return scores


def split_rates(
    predictions: Sequence[str],
    labels: Sequence[str],
    images: Sequence[str],
    *,
    errors: bool = False,
    seed: int = 0,
    resamples: int = 1000,
    positive: str = "yes",
) -> dict[str, float]:
    """The rates of one split in percent, named as in `POPEScores`, for answers that a rule has
    already read.

    Args:
        predictions: "yes", "no" or "unknown" for each question.
        labels, images: see `pope_scores`.
        errors: also return the standard errors (`f1_se`, ...), which need a bootstrap.
        seed: random seed of the bootstrap.
        resamples: number of bootstrap resamples.
        positive: the answer that precision, recall and f1 are about, "yes" or "no".
    """
    counts = _counts(predictions, labels, positive)
    return rates_with_errors(
        counts, images, _RATES, _rates, seed=seed, resamples=resamples, errors=errors
    )


def _counts(predictions: Sequence[str], labels: Sequence[str], positive: str = "yes") -> np.ndarray:
    """Per row: 1, true positive, false positive, false negative, correct, answered yes, unknown."""
    answer, label = np.asarray(predictions), np.char.lower(np.asarray(labels))
    said, true = answer == positive, label == positive
    one, correct = np.ones(len(answer), dtype=bool), answer == label
    columns = [one, said & true, said & ~true, ~said & true, correct]
    columns += [answer == "yes", answer == "unknown"]
    return np.stack(columns, axis=1).astype(float)


def _rates(sums: np.ndarray) -> np.ndarray:
    """Sums of `_counts`, shape (..., 7), to the six rates in the order of `_RATES`, shape (..., 6),
    in percent.
    """
    n, tp, fp, fn, correct, yes, unknown = np.moveaxis(np.asarray(sums, dtype=float), -1, 0)

    shares = ((correct, n), (tp, tp + fp), (tp, tp + fn), (2 * tp, 2 * tp + fp + fn))
    shares += ((yes, n), (unknown, n))
    return 100 * np.stack([ratio(part, whole) for part, whole in shares], axis=-1)


def _scores(counts: np.ndarray, images: Sequence[str], seed: int, resamples: int) -> POPEScores:
    rates = rates_with_errors(counts, images, _RATES, _rates, seed=seed, resamples=resamples)
    return POPEScores(n=len(counts), images=len(set(images)), **rates)
