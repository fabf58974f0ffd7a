"""What the model can do: POPE by split, multiple choice by relation, and CHAIR of its captions."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from hipp_ext.calibration import Batch, encode
from hipp_ext.evals.chair import ObjectWords, chair_scores, default_synonyms
from hipp_ext.evals.evaluator import Evaluator
from hipp_ext.evals.generation import place
from hipp_ext.evals.pope import pope_scores
from hipp_ext.evals.studies.measuring import mean_and_se
from hipp_ext.evals.studies.smolworld.quiz import Question, questions
from hipp_ext.evals.studies.smolworld.scenes import World
from hipp_ext.modes import evaluating

NEW_TOKENS = 48  # most tokens of a caption
BATCH = 16
EXAMPLES = 10  # captions that the result shows


def evaluate(
    model: Any, processor: Any, world: World, split: str, n: int | None = None
) -> dict[str, Any]:
    """Scores [%] of a model on a split, with standard errors.

    Args:
        model: a LLaVA, dense or pruned.
        processor: its processor.
        world: the world.
        split: the split. The test's is for claims alone.
        n: questions per task, and captions; None: the default sizes.
    """
    pope, choice, captions = (
        questions(world, t, split, n) for t in ("POPE", "ScienceQA", "Captions")
    )
    scores = Evaluator(model, processor, pope, choice, batch_size=BATCH).scores(model)
    by_rule = pope_scores(
        scores["pope"].answers,
        [q.answer for q in pope],
        [q.category for q in pope],
        [str(q.picture) for q in pope],
    )
    return {
        "split": split,
        "POPE": {name: asdict(found) for name, found in by_rule["vlmeval"].items()},
        "choice": _by_relation(choice, scores["choice"].answers),
        "captions": _captions(model, processor, world, captions),
    }


def _by_relation(asked: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    """Accuracy [%] by relation, and of all questions."""
    right: dict[str, list[float]] = {"overall": []}
    for question, answer in zip(asked, answers, strict=True):
        hit = 100.0 * (question.answer == answer)
        right["overall"].append(hit)
        right.setdefault(question.category, []).append(hit)
    return {relation: mean_and_se(hits) for relation, hits in sorted(right.items())}


def _captions(
    model: Any, processor: Any, world: World, asked: Sequence[Question]
) -> dict[str, Any]:
    written = write_captions(model, processor, asked)
    objects = [q.scene.present for q in asked if q.scene]
    words = ObjectWords(default_synonyms(world.drawings.names))
    scores = chair_scores(written, objects, [str(q.picture) for q in asked], words)
    examples = [{"model": text, "right": q.answer} for text, q in zip(written, asked, strict=True)]
    return {**asdict(scores), "examples": examples[:EXAMPLES]}


def write_captions(model: Any, processor: Any, asked: Sequence[Question]) -> list[str]:
    """The model's greedy answers to open questions."""
    parts = (asked[first : first + BATCH] for first in range(0, len(asked), BATCH))
    batches = (encode(processor, [q.prompt for q in p], [q.image for q in p]) for p in parts)
    return write_from(model, processor, batches)


@torch.no_grad()
def write_from(model: Any, processor: Any, batches: Iterable[Batch]) -> list[str]:
    """The model's greedy answers to batches of prompts."""
    found: list[str] = []
    with evaluating(model):
        for batch in batches:
            inputs = place(batch, model)
            length = inputs["input_ids"].shape[1]
            ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[:, length:]
            found += processor.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in found]
