"""The questions that exactly one of two models answers correctly, and a random sample of them to
look at.
"""

import base64
import io
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipp_ext.errors import DataError
from hipp_ext.evals.changes import Change, changes
from hipp_ext.evals.compare import check_same_questions
from hipp_ext.evals.runs import PREDICTIONS, AskedQuestion, Run, read_runs
from hipp_ext.evals.tables import YES_NO
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
        whole: change of the accuracy on all questions.
        parts: the same on each part.
        only_a, only_b: number of questions that only this model answers correctly.
        yes: share of the questions of each split whose right answer is yes [%]; empty for multiple
            choice.
        examples: random sample of the questions that one model answers correctly, in proportion to
            their numbers.
    """

    data: str
    whole: Change
    parts: tuple[Change, ...]
    only_a: int
    only_b: int
    yes: dict[str, float]
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
    pairs, pictures = [], []
    for data in (data for data in a if data in b):
        file_a, file_b = _predictions(a[data], near), _predictions(b[data], near)
        if file_a is None or file_b is None:
            continue
        try:
            run_a, run_b = (next(iter(read_runs(file).values())) for file in (file_a, file_b))
            check_same_questions(run_a, run_b)
        except DataError:  # different questions, or no questions.jsonl: they cannot be compared
            continue
        pairs.append((run_a, run_b))
        pictures.append(file_a.parents[3] / "images")
    return [
        _disagreement(run_a, run_b, whole, parts, _examples(run_a, run_b, folder, n, seed))
        for (run_a, run_b), (whole, parts), folder in zip(
            pairs, changes(pairs), pictures, strict=True
        )
    ]


def _disagreement(
    a: Run, b: Run, whole: Change, parts: Sequence[Change], examples: tuple[Example, ...]
) -> Disagreement:
    sides = list(_correct(a, b))
    splits: dict[str, list[bool]] = {}
    for question in a.questions if a.questions[0].kind == YES_NO else ():
        for split in question.category.split(","):
            splits.setdefault(split, []).append(question.label == "yes")
    return Disagreement(
        data=a.data,
        whole=whole,
        parts=tuple(parts),
        only_a=sides.count((True, False)),
        only_b=sides.count((False, True)),
        yes={split: 100 * sum(own) / len(own) for split, own in splits.items()},
        examples=examples,
    )


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


def _correct(a: Run, b: Run) -> Iterator[tuple[bool, bool]]:
    """Whether A and B answer each question correctly."""
    for q, *answers in zip(a.questions, a.answers, b.answers, strict=True):
        correct_a, correct_b = (q.prediction(text) == q.label for text in answers)
        yield correct_a, correct_b


def _examples(a: Run, b: Run, pictures: Path, n: int, seed: int) -> tuple[Example, ...]:
    sides: dict[bool, list[tuple[AskedQuestion, str, str]]] = {True: [], False: []}
    rows = zip(a.questions, a.answers, b.answers, strict=True)
    for row, (correct_a, correct_b) in zip(rows, _correct(a, b), strict=True):
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
