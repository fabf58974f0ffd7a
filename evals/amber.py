"""AMBER, its discriminative part: does the model see objects, attributes and relations that are not
there?

Its positive class is "no": precision and recall tell how well a model denies what the picture does
not show. All questions about existence have the answer no, so a model that says no to everything is
perfect there; the yes-rate beside the scores shows it.

Source: arXiv 2311.07397, and inference.py of the authors' repository.

Differs from the authors' code: it adds small constants to denominators and rounds precision and
recall to 0.1 before it computes F1. The results here are exact, and differ by less than 0.2 points.
"""

from collections.abc import Sequence

from hipp_ext.evals.pope import split_rates

# The type of a question in the authors' annotations -> its splits.
KINDS = {
    "discriminative-hallucination": ("existence",),
    "discriminative-attribute-state": ("attribute", "state"),
    "discriminative-attribute-number": ("attribute", "number"),
    "discriminative-attribute-action": ("attribute", "action"),
    "discriminative-relation": ("relation",),
    "relation": ("relation",),
}
NAME = "AMBER"
SPLITS = ("existence", "attribute", "relation", "state", "number", "action")
ENDING = "\nPlease answer yes or no."  # what VLMEvalKit adds to a question


def official_answer(text: str) -> str:
    """ "yes" or "no" if the answer is exactly Yes or No, as the authors' code requires; else
    "unknown", which is wrong, and no answer no.
    """
    return {"Yes": "yes", "No": "no"}.get(text, "unknown")


def amber_scores(
    predictions: Sequence[str],
    labels: Sequence[str],
    splits: Sequence[Sequence[str]],
    images: Sequence[str],
    *,
    errors: bool = True,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, dict[str, float]]:
    """Scores by split: "overall", then those of `SPLITS` that were asked.

    Each has `n` (questions), `images` (distinct ones), and in percent with standard errors (`_se`,
    over images): accuracy; precision, recall and f1 of the answer no (0 where nothing is divided by
    nothing); yes_rate and unknown_rate. See `pope.POPEScores`.

    Args:
        predictions: "yes", "no" or "unknown" for each question.
        labels: "Yes" or "No" for each question.
        splits: the values of `KINDS` for each question.
        images: any text that identifies the image of each question.
        errors: whether to compute the standard errors.
        seed: random seed of the bootstrap over images.
        resamples: number of bootstrap resamples.

    Raises:
        ValueError: the sequences differ in length or are empty.
    """
    if not len(predictions) == len(labels) == len(splits) == len(images) > 0:
        lengths = [len(predictions), len(labels), len(splits), len(images)]
        raise ValueError(f"AMBER needs columns of one length, above 0; got {lengths}")
    scores: dict[str, dict[str, float]] = {}
    for split in ("overall", *SPLITS):
        rows = [row for row, own in enumerate(splits) if split == "overall" or split in own]
        if rows:
            own = [images[row] for row in rows]
            rates = split_rates(
                [predictions[row] for row in rows],
                [labels[row] for row in rows],
                own,
                errors=errors,
                seed=seed,
                resamples=resamples,
                positive="no",
            )
            scores[split] = {"n": len(rows), "images": len(set(own)), **rates}
    return scores
