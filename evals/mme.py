"""MME: two questions about every picture, one with the answer yes and one with the answer no, in
14 subtasks. A model that says yes to everything gets half of the accuracy and none of the
accuracy+.

Source: arXiv 2306.13394 (accuracy, accuracy+ and their sum, the score; 10 subtasks of
perception and 4 of cognition), and calculation.py of the authors' eval_tool (how an answer is
read).
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from hipp_ext.evals.statistics import rates_with_errors, ratio, whole_groups

NAME = "MME"
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene")
PERCEPTION += ("landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TOTALS = {"perception": PERCEPTION, "cognition": COGNITION}
SUBTASKS = PERCEPTION + COGNITION
PER_PICTURE = 2  # questions about a picture in one subtask
_BEGINNING = 4  # characters of an answer that the authors read
_COLUMNS = 6  # of `_counts`
_RATES = ("score", "accuracy", "accuracy_plus", "yes_rate", "unknown_rate")


def official_answer(text: str) -> str:
    """ "yes", "no" or "unknown" by the authors' rule: the first of yes and no that the first four
    characters contain.
    """
    beginning = text.lower()[:_BEGINNING]
    return "yes" if "yes" in beginning else "no" if "no" in beginning else "unknown"


def total_of(subtask: str) -> str:
    """The total that a subtask belongs to: "perception" or "cognition"."""
    return next(total for total, own in TOTALS.items() if subtask in own)


def paired_rows(pairs: Sequence[str]) -> list[int]:
    """The rows whose picture has both of its questions; a limit may cut off the second."""
    asked = Counter(pairs)
    return [row for row, pair in enumerate(pairs) if asked[pair] == PER_PICTURE]


def mme_scores(
    predictions: Sequence[str],
    labels: Sequence[str],
    subtasks: Sequence[str],
    pairs: Sequence[str],
    images: Sequence[str],
    *,
    errors: bool = True,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, dict[str, float]]:
    """Scores by split: "overall", "perception", "cognition", then the subtasks that were asked.

    Each has `n` (questions), `images` (distinct ones), and with standard errors (`_se`, over
    images):

    - accuracy: share of correct answers [%]; an unknown answer is wrong. Higher is better, as for
      the next two.
    - accuracy_plus: share of pictures with both answers correct [%].
    - score: sum of the two, [0, 200] for a subtask; for a total the sum over its subtasks, [0,
      2000] for perception and [0, 800] for cognition.
    - yes_rate, unknown_rate: shares of the answers yes, and of those that the rule cannot read [%].

    Args:
        predictions: "yes", "no" or "unknown" for each question.
        labels: "Yes" or "No" for each question.
        subtasks: one of `SUBTASKS` for each question.
        pairs: any text that identifies the picture of each question within its subtask.
        images: any text that identifies the content of the picture, which subtasks may share.
        errors: whether to compute the standard errors.
        seed: random seed of the bootstrap over images.
        resamples: number of bootstrap resamples.

    Raises:
        ValueError: the sequences differ in length or are empty, a subtask is unknown, or a picture
            does not have two questions in its subtask.
    """
    lengths = {len(column) for column in (predictions, labels, subtasks, pairs, images)}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"MME needs columns of one length, above 0; got {sorted(lengths)}")
    if unknown := set(subtasks) - set(SUBTASKS):
        raise ValueError(f"unknown subtasks of MME: {sorted(unknown)[:3]}")
    keys = [f"{subtask}/{pair}" for subtask, pair in zip(subtasks, pairs, strict=True)]
    if len(paired_rows(keys)) < len(keys):
        raise ValueError("MME needs two questions about every picture of a subtask")
    counts = _counts(predictions, labels, keys)
    splits = {"overall": SUBTASKS, **TOTALS, **{name: (name,) for name in SUBTASKS}}
    scores: dict[str, dict[str, float]] = {}
    for split, members in splits.items():
        rows = [row for row, subtask in enumerate(subtasks) if subtask in members]
        if rows:
            own = [images[row] for row in rows]
            by_subtask = _by_subtask(counts[rows], [subtasks[row] for row in rows])
            rates = rates_with_errors(
                by_subtask, own, _RATES, _rates, seed=seed, resamples=resamples, errors=errors
            )
            scores[split] = {"n": len(rows), "images": len(set(own)), **rates}
    return scores


def _counts(predictions: Sequence[str], labels: Sequence[str], keys: Sequence[str]) -> np.ndarray:
    """Per row: 1, correct, pictures, pictures with both answers correct, answered yes, unknown."""
    answer = np.asarray(predictions)
    correct = answer == np.char.lower(np.asarray(labels))
    columns = [np.ones(len(answer)), correct, *whole_groups(correct, keys).T]
    return np.stack([*columns, answer == "yes", answer == "unknown"], axis=1).astype(float)


def _by_subtask(counts: np.ndarray, subtasks: Sequence[str]) -> np.ndarray:
    """The counts with columns of their own for every subtask, shape (rows, subtasks * 6)."""
    place = {name: number for number, name in enumerate(dict.fromkeys(subtasks))}
    spread = np.zeros((len(counts), len(place), counts.shape[1]))
    spread[np.arange(len(counts)), [place[name] for name in subtasks]] = counts
    return spread.reshape(len(counts), -1)


def _rates(sums: np.ndarray) -> np.ndarray:
    """Sums of `_by_subtask`, shape (..., subtasks * 6), to the rates in the order of `_RATES`,
    shape (..., 5).
    """
    columns = np.asarray(sums, dtype=float).reshape(*sums.shape[:-1], -1, _COLUMNS)
    n, correct, pictures, both, yes, unknown = np.moveaxis(columns, -1, 0)
    total = n.sum(axis=-1)
    score = (ratio(correct, n) + ratio(both, pictures)).sum(axis=-1)
    plus = ratio(both.sum(axis=-1), pictures.sum(axis=-1))
    accuracy, *rest = (ratio(part.sum(axis=-1), total) for part in (correct, yes, unknown))
    return 100 * np.stack([score, accuracy, plus, *rest], axis=-1)
