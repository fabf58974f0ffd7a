"""HallusionBench: the same question about a picture and about an edited one, and several questions
about one figure. A model that answers from what it has read, and not from the picture, fails the
edited ones.

Questions are VD (they need the picture) or VS (the picture adds to what is known, or contradicts
it), in subcategories such as VD_illusion and VS_chart.

Source: arXiv 2310.14566, and utils.py of the authors' repository (which questions form
a figure and a pair).

Differs from the authors' evaluation, as VLMEvalKit does: they let GPT-4 judge answers, and here the
words yes and no are read; their 178 questions without a picture are left out.
"""

from collections.abc import Sequence

import numpy as np

from hipp_ext.evals.statistics import rates_with_errors, ratio, whole_groups

NAME = "HallusionBench"
_RATES = ("accuracy", "figure_accuracy", "pair_accuracy", "yes_rate", "unknown_rate")


def places(index: str) -> tuple[str, str, str] | None:
    """The numbers of set, figure and question in an index such as HallusionBench_VD_math_3_1_0, as
    VLMEvalKit reads them: the fourth to sixth part. None if there are fewer parts.
    """
    parts = index.split("_")
    return (parts[3], parts[4], parts[5]) if len(parts) > 5 else None


def hallusionbench_scores(
    predictions: Sequence[str],
    labels: Sequence[str],
    splits: Sequence[Sequence[str]],
    indices: Sequence[str],
    *,
    errors: bool = True,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, dict[str, float]]:
    """Scores by split: "overall", then the categories and subcategories of the questions.

    Each has the numbers `n` (questions), `figures` and `pairs`, and in percent with standard errors
    (`_se`):

    - accuracy (aAcc): share of correct answers; an unknown answer is wrong.
    - figure_accuracy (fAcc): share of figures with all answers correct.
    - pair_accuracy (qAcc): share of questions that are answered correctly about all figures of
      their set.
    - yes_rate, unknown_rate: shares of the answers yes, and of those that cannot be read.

    Figures of one set are versions of one picture and share their questions. So the bootstrap draws
    whole sets.

    Args:
        predictions: "yes", "no" or "unknown" for each question.
        labels: "Yes" or "No" for each question.
        splits: category and subcategory of each question, such as ("VD", "VD_illusion").
        indices: index of each question; see `places`.
        errors: whether to compute the standard errors.
        seed: random seed of the bootstrap over sets.
        resamples: number of bootstrap resamples.

    Raises:
        ValueError: the sequences differ in length or are empty, or an index has fewer parts.
    """
    if not len(predictions) == len(labels) == len(splits) == len(indices) > 0:
        lengths = [len(predictions), len(labels), len(splits), len(indices)]
        raise ValueError(f"HallusionBench needs columns of one length, above 0; got {lengths}")
    found = [places(index) for index in indices]
    if None in found:
        raise ValueError(f"{indices[found.index(None)]!r} is no index of HallusionBench")
    sets = [f"{own[-1]}_{place[0]}" for own, place in zip(splits, found, strict=True) if place]
    figures = [f"{one}_{place[1]}" for one, place in zip(sets, found, strict=True) if place]
    pairs = [f"{one}_{place[2]}" for one, place in zip(sets, found, strict=True) if place]
    counts = _counts(predictions, labels, figures, pairs)
    scores: dict[str, dict[str, float]] = {}
    for split in dict.fromkeys(["overall", *sorted(name for own in splits for name in own)]):
        rows = [row for row, own in enumerate(splits) if split == "overall" or split in own]
        rates = rates_with_errors(
            counts[rows],
            [sets[row] for row in rows],
            _RATES,
            _rates,
            seed=seed,
            resamples=resamples,
            errors=errors,
        )
        _, _, of_figures, _, of_pairs, *_ = counts[rows].sum(axis=0)
        numbers = {"n": len(rows), "figures": int(of_figures), "pairs": int(of_pairs)}
        scores[split] = {**numbers, **rates}
    return scores


def _counts(
    predictions: Sequence[str], labels: Sequence[str], figures: Sequence[str], pairs: Sequence[str]
) -> np.ndarray:
    """Per row: 1, correct, figures, wholly correct ones, pairs, wholly correct ones, answered yes,
    unknown.
    """
    answer = np.asarray(predictions)
    correct = answer == np.char.lower(np.asarray(labels))
    columns = [np.ones(len(answer)), correct]
    columns += [*whole_groups(correct, figures).T, *whole_groups(correct, pairs).T]
    return np.stack([*columns, answer == "yes", answer == "unknown"], axis=1).astype(float)


def _rates(sums: np.ndarray) -> np.ndarray:
    """Sums of the columns, shape (..., 8), to the rates in the order of `_RATES`, shape (..., 5),
    in percent.
    """
    n, correct, figures, good, pairs, same, yes, unknown = np.moveaxis(sums, -1, 0)
    shares = ((correct, n), (good, figures), (same, pairs), (yes, n), (unknown, n))
    return 100 * np.stack([ratio(part, whole) for part, whole in shares], axis=-1)
