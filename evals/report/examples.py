"""A random sample of the questions that exactly one of two models answers correctly, to look at."""

import base64
import io
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipp_ext.errors import DataError
from hipp_ext.evals.runs import AskedQuestion, Run
from hipp_ext.files.untrusted import PICTURE_BYTES, is_below, read_plain, rgb_picture

MAX_SIDE = 320  # longest side of an image in a report [px]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question that one model answers correctly and the other does not.

    Attributes:
        question: the question as it was asked.
        answer_a, answer_b: answers of the models.
        a_is_correct: whether A answers correctly; otherwise B does.
        picture: the image as a data URI; None if it is no longer there.
        small: whether the image has few pixels and should be enlarged without smoothing.
    """

    question: AskedQuestion
    answer_a: str
    answer_b: str
    a_is_correct: bool
    picture: str | None
    small: bool


def correct(a: Run, b: Run) -> Iterator[tuple[bool, bool]]:
    """Whether A and B answer each question correctly."""
    for q, *answers in zip(a.questions, a.answers, b.answers, strict=True):
        correct_a, correct_b = (q.prediction(text) == q.label for text in answers)
        yield correct_a, correct_b


def draw_examples(a: Run, b: Run, pictures: Path, n: int, seed: int) -> tuple[Example, ...]:
    """`n` of the questions that one model answers correctly, at random, in proportion to the
    numbers of both sides.

    Args:
        a, b: answers of the models to the same questions.
        pictures: folder of the images.
        n: number of examples.
        seed: random seed of the draw.
    """
    sides: dict[bool, list[tuple[AskedQuestion, str, str]]] = {True: [], False: []}
    rows = zip(a.questions, a.answers, b.answers, strict=True)
    for row, (correct_a, correct_b) in zip(rows, correct(a, b), strict=True):
        if correct_a != correct_b:
            sides[correct_a].append(row)
    total = sum(map(len, sides.values()))
    draw, examples = random.Random(seed), []
    for side, own in sides.items():
        size = min(len(own), round(n * len(own) / total)) if total else 0
        for question, answer_a, answer_b in draw.sample(own, size):
            examples.append(
                Example(
                    question=question,
                    answer_a=answer_a,
                    answer_b=answer_b,
                    a_is_correct=side,
                    **_picture(pictures, question),
                )
            )
    return tuple(examples)


def _picture(folder: Path, question: AskedQuestion) -> dict[str, Any]:
    """The fields `picture` and `small` of an example."""
    file = folder / f"{question.image[:32]}.png"
    try:
        if not re.fullmatch("[0-9a-f]{64}", question.image) or not is_below(file, folder):
            raise DataError(f"{file} is not an image of a run")
        picture = rgb_picture(read_plain(file, PICTURE_BYTES, "picture"))
    except DataError:
        return {"picture": None, "small": False}
    small = max(picture.size) <= 96
    buffer = io.BytesIO()
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    kind = "png" if small else "jpeg"
    picture.save(buffer, kind, quality=82)  # PNG has no quality
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"picture": f"data:image/{kind};base64,{data}", "small": small}
