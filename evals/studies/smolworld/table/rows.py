"""Rows of the calibration split: scores, sensitivity and least squares are measured on them."""

from typing import Any

from hipp_ext.calibration import Batch, Calibration, encode
from hipp_ext.evals.studies.smolworld.quiz import Question, questions
from hipp_ext.evals.studies.smolworld.scenes import World
from hipp_ext.evals.studies.smolworld.table.asked import CAPTIONS, CHOICE, POPE

BATCH = 16
CAPTIONS_OF = 8  # rows of a task for each caption: a caption has a dozen tokens, other answers one
SPREAD = 4  # one question of so many, so that the rows show more pictures


def calibration_rows(world: World, processor: Any, rows: int) -> Calibration:
    """Choices and captions for utility, POPE for robustness, with their answers.

    Args:
        world: the world.
        processor: the model's.
        rows: rows of each task, without the captions.
    """
    choices = questions(world, CHOICE, "calibration", rows)
    captions = questions(world, CAPTIONS, "calibration", rows // CAPTIONS_OF)
    pope = questions(world, POPE, "calibration", SPREAD * rows)[::SPREAD]
    return Calibration.from_batches(
        {
            "utility": _encoded(processor, (*choices, *captions)),
            "robustness": _encoded(processor, pope),
        }
    )


def _encoded(processor: Any, asked: tuple[Question, ...]) -> list[Batch]:
    ordered = sorted(asked, key=lambda q: len(q.prompt))
    found = []
    for first in range(0, len(ordered), BATCH):
        own = ordered[first : first + BATCH]
        prompts, images, answers = zip(*((q.prompt, q.image, q.answer) for q in own), strict=True)
        found.append(encode(processor, prompts, images, answers))
    return found
