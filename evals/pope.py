"""POPE: does the model see objects that are not there? Answers in, percentages with error bars out.

Two rules turn a free answer into yes or no, and they part exactly where a broken model ends up:

- the authors' rule calls every answer without a "no" a yes, so an empty or garbled answer is a yes, and a model that
  answers nothing at all scores F1 66.7;
- VLMEvalKit's rule wants exactly one of the words "yes" and "no", else the answer is unknown: wrong in the accuracy,
  and a no in the F1. The same model scores 0.

So both are always reported, side by side, with the share of yes and of unknown answers.

Source: arXiv 2305.10355, section 5 (the metrics), and evaluate.py of the authors' repository (the rule).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hipp_ext.evals.metrics import clustered_se, f1_percent

SPLITS = ("random", "popular", "adversarial")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_LONE_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
_PERIODS_REMOVED = (
    32  # VLMEvalKit passes re.UNICODE (32) where sub() takes its count; kept, to give its numbers
)


def official_answer(text: str) -> str:
    """ "yes" or "no" by the POPE authors' rule: no if the first sentence has the word No, not or no, else yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def vlmeval_answer(text: str) -> str:
    """ "yes" or "no" if exactly one of the two is a word of the answer, else "unknown": VLMEvalKit's rule."""
    text = text.lower()
    stripped = text
    for mark in _PUNCTUATION:
        alone = mark + " " in text or " " + mark in text or _DIGIT_COMMA.search(text)
        stripped = stripped.replace(mark, "" if alone else " ")
    words = _LONE_PERIOD.sub("", stripped, count=_PERIODS_REMOVED).split()
    if ("yes" in words) == ("no" in words):
        return "unknown"
    return "yes" if "yes" in words else "no"


RULES = {"vlmeval": vlmeval_answer, "official": official_answer}


@dataclass(frozen=True, kw_only=True)
class POPEScores:
    """Scores of one split by one rule. Rates and their standard errors (`_se`) are percentages, [0, 100].

    Attributes:
        n: questions; in "overall" one that belongs to several splits counts once for each, as in VLMEvalKit.
        images: distinct images, over which the standard errors are taken (NaN when there is only one).
        accuracy: right answers; unknown is wrong. Higher is better, as for precision, recall and f1.
        precision: right among the answers yes; 0 if there is none.
        recall: yes among the questions whose answer is yes; 0 if there is none.
        f1: harmonic mean of precision and recall; 0 if both are.
        yes_rate: answers yes. Near 50 for a model that looks, since POPE's labels are balanced.
        unknown_rate: answers that the rule cannot read; always 0 by the authors' rule.
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
        answers: what the model said, one per question.
        labels: "Yes" or "No", one per question.
        categories: comma lists of the splits of each question, such as "random,popular".
        images: which image each question is about: any text that names it.
        seed: of the bootstrap over images behind the standard errors.
        resamples: bootstrap draws.

    Raises:
        ValueError: the sequences differ in length, are empty, or hold a label that is not Yes or No.
    """
    if not len(answers) == len(labels) == len(categories) == len(images) > 0:
        lengths = [len(answers), len(labels), len(categories), len(images)]
        raise ValueError(
            f"POPE needs answers, labels, categories and images of one length, above 0; got {lengths}"
        )
    if wrong := set(labels) - {"Yes", "No"}:
        raise ValueError(f"POPE labels are Yes or No, not {sorted(map(str, wrong))[:3]}")
    splits = {"overall": []}
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
    said: Sequence[str],
    labels: Sequence[str],
    images: Sequence[str],
    *,
    errors: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    """The rates of one split, as `POPEScores` has them, of answers that a rule has read already; in percent.

    Args:
        said: "yes", "no" or "unknown", one per question.
        labels, images: see `pope_scores`.
        errors: also the standard errors (`f1_se`, ...), which take a bootstrap.
        seed: of the bootstrap.
    """
    counts = _counts(said, labels)
    if errors:
        return vars(_scores(counts, list(images), seed, 1000))
    return dict(zip(_RATES, map(float, _rates(counts.sum(axis=0))), strict=True))


def _counts(said: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Per row: 1, true positive, false positive, false negative, right, said yes, unknown."""
    answer, label = np.asarray(said), np.char.lower(np.asarray(labels))
    yes, positive, one = answer == "yes", label == "yes", np.ones(len(answer), dtype=bool)
    columns = [
        one,
        yes & positive,
        yes & ~positive,
        ~yes & positive,
        answer == label,
        yes,
        answer == "unknown",
    ]
    return np.stack(columns, axis=1).astype(float)


def _rates(sums: np.ndarray) -> np.ndarray:
    """Sums of `_counts`, shape (..., 7), to the six rates in the order of `_RATES`, shape (..., 6), in percent."""
    n, tp, fp, fn, right, yes, unknown = np.moveaxis(np.asarray(sums, dtype=float), -1, 0)

    def share(part, whole):
        return 100 * np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)

    precision, recall = share(tp, tp + fp), share(tp, tp + fn)
    return np.stack(
        [
            share(right, n),
            precision,
            recall,
            f1_percent(tp, fp + fn),
            share(yes, n),
            share(unknown, n),
        ],
        axis=-1,
    )


def _scores(counts: np.ndarray, images: list, seed: int, resamples: int) -> POPEScores:
    rates = _rates(counts.sum(axis=0))
    errors = clustered_se(counts, images, _rates, seed=seed, resamples=resamples)
    fields = {name: float(rate) for name, rate in zip(_RATES, rates, strict=True)}
    fields |= {f"{name}_se": float(error) for name, error in zip(_RATES, errors, strict=True)}
    return POPEScores(n=len(counts), images=len(set(images)), **fields)
