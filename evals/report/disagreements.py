"""The questions that exactly one of two models answers correctly, and a random sample of them to
look at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipp_ext.errors import DataError
from hipp_ext.evals.compare import check_same_questions
from hipp_ext.evals.report.changes import Change, changes
from hipp_ext.evals.report.examples import Example, correct, draw_examples
from hipp_ext.evals.runs import PREDICTIONS, Run, read_runs
from hipp_ext.evals.tables import YES_NO
from hipp_ext.files.untrusted import is_below


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
        _disagreement(run_a, run_b, whole, parts, draw_examples(run_a, run_b, folder, n, seed))
        for (run_a, run_b), (whole, parts), folder in zip(
            pairs, changes(pairs), pictures, strict=True
        )
    ]


def _disagreement(
    a: Run, b: Run, whole: Change, parts: Sequence[Change], examples: tuple[Example, ...]
) -> Disagreement:
    sides = list(correct(a, b))
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
