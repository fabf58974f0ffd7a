"""Two models' runs -> the questions on which exactly one of them is right, and a fair sample of them to look at."""

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
from hipp_ext.evals.pope import vlmeval_answer
from hipp_ext.evals.runs import PREDICTIONS, AskedQuestion, Run, read_runs
from hipp_ext.evals.scienceqa import option_letter
from hipp_ext.files.untrusted import PICTURE_BYTES, is_below, read_plain, rgb_picture

SIDE = 320  # longest side of a picture in a report [px]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question that one model answers right and the other wrong.

    Attributes:
        question: as it was asked.
        said_a, said_b: the models' answers.
        a_is_right: else B is.
        picture: a data URI; None where the picture is no longer at hand.
        small: whether the picture has few pixels, so that it is to be enlarged without smoothing.
    """

    question: AskedQuestion
    said_a: str
    said_b: str
    a_is_right: bool
    picture: str | None
    small: bool


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """All that is to be said of two models on one data set.

    Attributes:
        data: name of the data set.
        whole: the comparison over all questions, by VLMEvalKit's rule or by letter.
        examples: drawn at random, not chosen, from either side in proportion.
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
    """Where two models disagree, on every data set that both were asked the same questions of.

    Args:
        a, b: data set -> record of `vlmeval`, of each model.
        near: folders in which the predictions lie; records may hold the paths of another machine, or lead anywhere. Pictures
            are those of the same outputs, each under its own hash, and no others.
        n: examples per data set.
        seed: of their draw.
    """
    found = []
    for data in a:
        if data not in b:
            continue
        file_a, file_b = _predictions(a[data], near), _predictions(b[data], near)
        if file_a is None or file_b is None:
            continue
        try:
            run_a, run_b = (next(iter(read_runs(file).values())) for file in (file_a, file_b))
            whole = compare_runs(run_a, run_b)[0]
        except (
            DataError
        ):  # another number of questions, or without questions.jsonl: nothing to set side by side
            continue
        pictures = file_a.parents[3] / "images"
        found.append(
            Disagreement(
                data=data, whole=whole, examples=_examples(run_a, run_b, pictures, n, seed)
            )
        )
    return found


def _predictions(record: Mapping[str, Any], near: Sequence[Path]) -> Path | None:
    """The predictions of a record: where it says, if that is in one of `near`, else at the same place below one of them or
    its folder outputs."""
    written = Path(record["predictions"])
    inside = Path(*written.parts[-4:])  # MODEL-HASH/DATA/run-KEY/predictions.jsonl
    places = [written, *(top / inside for folder in near for top in (folder, folder / "outputs"))]
    folders = [folder if folder.is_dir() else folder.parent for folder in near]
    return next(
        (
            place
            for place in places
            if _is_file(place) and any(is_below(place, folder) for folder in folders)
        ),
        None,
    )


def _is_file(place: Path) -> bool:
    try:
        return place.name == PREDICTIONS and place.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _examples(a: Run, b: Run, pictures: Path, n: int, seed: int) -> tuple[Example, ...]:
    rows = list(zip(a.questions, a.answers, b.answers, strict=True))
    split: dict[bool, list[tuple[AskedQuestion, str, str]]] = {True: [], False: []}
    for question, said_a, said_b in rows:
        right = [_right(question, said) for said in (said_a, said_b)]
        if right[0] != right[1]:
            split[right[0]].append((question, said_a, said_b))
    total = sum(map(len, split.values()))
    taken = {
        side: min(len(own), round(n * len(own) / total)) if total else 0
        for side, own in split.items()
    }
    draw = random.Random(seed)
    drawn = [
        (side, *row) for side in (True, False) for row in draw.sample(split[side], taken[side])
    ]
    return tuple(
        Example(
            question=q,
            said_a=said_a,
            said_b=said_b,
            a_is_right=side,
            picture=(p := _picture(pictures, q))[0],
            small=p[1],
        )
        for side, q, said_a, said_b in drawn
    )


def _right(question: AskedQuestion, said: str) -> bool:
    if question.options is None:
        return vlmeval_answer(said) == question.answer.lower()
    return option_letter(said, question.options) == question.answer


def _picture(folder: Path, question: AskedQuestion) -> tuple[str | None, bool]:
    """The question's picture as a data URI, and whether it is tiny."""
    file = folder / f"{question.image[:32]}.png"
    if not re.fullmatch("[0-9a-f]{64}", question.image) or not is_below(file, folder):
        return None, False
    try:
        picture = rgb_picture(read_plain(file, PICTURE_BYTES, "picture"))
    except DataError:
        return None, False
    small = max(picture.size) <= 96
    buffer = io.BytesIO()
    picture.thumbnail((SIDE, SIDE))
    picture.save(buffer, *(["PNG"] if small else ["JPEG"]), **({} if small else {"quality": 82}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", small
