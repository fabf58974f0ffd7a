"""The questions that exactly one of two models answers correctly, and a random sample of them to
look at.
"""

import base64
import io
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipp_ext.errors import DataError
from hipp_ext.evals.compare import Comparison, compare_runs
from hipp_ext.evals.runs import PREDICTIONS, AskedQuestion, Run, read_runs
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


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """How two models differ on one data set.

    Attributes:
        data: name of the data set.
        whole: comparison on all questions, by VLMEvalKit's rule.
        examples: random sample of the questions that one model answers correctly, in proportion to
            their numbers.
    """

    data: str
    whole: Comparison
    examples: tuple[Example, ...]


def disagreements(
    a: Mapping[str, Mapping[str, Any]],
    b: Mapping[str, Mapping[str, Any]],
    near: Sequence[Path],
    *,
    n: int = 6,
    seed: int = 0,
) -> list[Disagreement]:
    """The disagreements of two models on every data set with the same questions for both.

    Args:
        a, b: records of `vlmeval` of each model, by data set.
        near: folders that hold the predictions. The paths in records may be those of another
            machine, or lead anywhere. Images are read from the same outputs only, each under its
            own hash.
        n: number of examples per data set.
        seed: random seed of their draw.
    """
    found = []
    for data in (data for data in a if data in b):
        file_a, file_b = _predictions(a[data], near), _predictions(b[data], near)
        if file_a is None or file_b is None:
            continue
        try:
            run_a, run_b = (next(iter(read_runs(file).values())) for file in (file_a, file_b))
            whole = compare_runs(run_a, run_b)[0]
        except DataError:  # different questions, or no questions.jsonl: they cannot be compared
            continue
        pictures = file_a.parents[3] / "images"
        found.append(
            Disagreement(
                data=data, whole=whole, examples=_examples(run_a, run_b, pictures, n, seed)
            )
        )
    return found


def _predictions(record: Mapping[str, Any], near: Sequence[Path]) -> Path | None:
    """The predictions file of a record if it is in a folder of `near`, else the file of the same
    relative path there.
    """
    written = Path(record["predictions"])
    inside = Path(*written.parts[-4:])  # MODEL-HASH/DATA/run-KEY/predictions.jsonl
    places = [written, *(top / inside for folder in near for top in (folder, folder / "outputs"))]
    folders = [folder if folder.is_dir() else folder.parent for folder in near]
    for place in places:
        if _is_file(place) and any(is_below(place, folder) for folder in folders):
            return place
    return None


def _is_file(place: Path) -> bool:
    try:
        return place.name == PREDICTIONS and place.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _examples(a: Run, b: Run, pictures: Path, n: int, seed: int) -> tuple[Example, ...]:
    sides: dict[bool, list[tuple[AskedQuestion, str, str]]] = {True: [], False: []}
    for row in zip(a.questions, a.answers, b.answers, strict=True):
        correct_a, correct_b = (row[0].prediction(text) == row[0].label for text in row[1:])
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
