"""What `vlmeval` leaves in a folder, read again: which questions were asked, and what a model answered.

<work-dir>/<model>-<hash>/<data>/run-<key>/ holds predictions.jsonl and questions.jsonl, and <data>/results.json says
which run is the last.
"""

import glob
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipp_ext.evals.tables import CHOICE, YES_NO, Table, read_table, row_options

from hipp_ext.errors import DataError
from hipp_ext.files import write_atomic

PREDICTIONS, QUESTIONS = "predictions.jsonl", "questions.jsonl"


@dataclass(frozen=True, kw_only=True)
class AskedQuestion:
    """A question as it was asked.

    Attributes:
        index: of its row, as text.
        question, answer, category: the cells of the row; category is empty where there is none.
        image: SHA-256 of the picture.
        options: letter to text; None for yes/no.
    """

    index: str
    question: str
    answer: str
    category: str
    image: str
    options: dict[str, str] | None

    @property
    def kind(self) -> str:
        """`YES_NO` or `CHOICE`."""
        return YES_NO if self.options is None else CHOICE


@dataclass(frozen=True, kw_only=True)
class Run:
    """The answers of one model to one data set: those of `questions` that are answered, in order."""

    model: str
    data: str
    questions: tuple[AskedQuestion, ...]
    answers: tuple[str, ...]


def table_rows(table: Table) -> list[AskedQuestion]:
    """The questions of a checked table."""
    frame = table.frame
    options = [None] * len(frame) if table.kind == YES_NO else row_options(frame)
    categories = frame["category"].tolist() if "category" in frame else [""] * len(frame)
    rows = zip(frame["index"], frame["question"], frame["answer"], categories, table.images, options, strict=True)
    return [
        AskedQuestion(
            index=str(i), question=str(q), answer=str(a), category=str(c), image=image,
            options=None if o is None else {letter: str(text) for letter, text in o.items()},
        )
        for i, q, a, c, image, o in rows
    ]  # fmt: skip


def write_questions(table: Table, folder: Path) -> None:
    """Put questions.jsonl beside the predictions, so that the run can be read without the TSV."""
    lines = [json.dumps(vars(question)) + "\n" for question in table_rows(table)]
    write_atomic(folder / QUESTIONS, "".join(lines))


def read_runs(path: str | Path, tsv: str | Path | None = None) -> dict[str, Run]:
    """Data name -> run, of a predictions file, a run's folder, a data set's folder or a model's folder.

    Args:
        path: the file or folder; a model's folder holds one run for each data set, and may be named without its hash.
        tsv: the questions, where no questions.jsonl lies beside the predictions.

    Raises:
        DataError: there is no run, or a file of it is missing or damaged.
    """
    path = _with_hash(Path(path).expanduser())
    if path.is_file():
        return _named(_read_run(path, tsv))
    if (path / PREDICTIONS).is_file():
        return _named(_read_run(path / PREDICTIONS, tsv))
    folders = [path] if (path / "results.json").is_file() else sorted(f.parent for f in path.glob("*/results.json"))
    if not folders:
        inside = dict.fromkeys(sorted(file.parents[1].name for file in path.glob("*/*/results.json")))
        hint = (
            f"name one of the models in it: {', '.join(inside)}"
            if inside
            else ("a folder such as outputs/MODEL-HASH is needed, or a file predictions.jsonl")
        )
        raise DataError(f"{path} holds no results of `vlmeval`; {hint}")
    return {folder.name: _read_run(_last_predictions(folder), tsv) for folder in folders}


def _with_hash(path: Path) -> Path:
    """`path`, or where there is no such thing the only folder PATH-HASH.

    Raises:
        DataError: there are several.
    """
    if path.exists():
        return path
    found = sorted(p for p in path.parent.glob(f"{glob.escape(path.name)}-*") if re.fullmatch("[0-9a-f]{8}", p.name[-8:]))
    found = [p for p in found if p.name[:-9] == path.name]
    if len(found) > 1:
        raise DataError(f"{path}: several models of this name were evaluated, name one: {', '.join(p.name for p in found)}")
    return found[0] if found else path


def _named(run: Run) -> dict[str, Run]:
    return {run.data: run}


def _last_predictions(folder: Path) -> Path:
    """The predictions that results.json speaks of; it has the path of the time of writing, so only its end is used."""
    try:
        written = Path(json.loads((folder / "results.json").read_text(encoding="utf-8"))["predictions"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{folder / 'results.json'} is damaged: {error!r}") from None
    return folder / written.parent.name / written.name


def _read_run(predictions: Path, tsv: str | Path | None) -> Run:
    said = {str(entry["index"]): str(entry["prediction"]) for entry in _entries(predictions, ("index", "prediction"))}
    asked = _questions(predictions.parent / QUESTIONS, tsv)
    if strangers := [index for index in said if index not in {question.index for question in asked}]:
        raise DataError(f"{predictions}: it answers index {strangers[0]}, which is not among the questions")
    answered = tuple(question for question in asked if question.index in said)
    if not answered:
        raise DataError(f"{predictions} holds no answers")
    place = predictions.resolve().parents
    return Run(
        model=place[2].name if len(place) > 2 else place[0].name,
        data=place[1].name if len(place) > 2 else predictions.stem,
        questions=answered,
        answers=tuple(said[question.index] for question in answered),
    )


def _questions(file: Path, tsv: str | Path | None) -> list[AskedQuestion]:
    if tsv is not None:
        with tempfile.TemporaryDirectory() as folder:
            return table_rows(read_table(tsv, folder))
    if not file.is_file():
        raise DataError(
            f"{file} is missing, so it is not known what was asked. Give the TSV with --data; or run the same "
            "`vlmeval` command again, which keeps the answers and writes this file"
        )
    fields = ("index", "question", "answer", "category", "image", "options")
    return [AskedQuestion(**{field: entry[field] for field in fields}) for entry in _entries(file, fields)]


def _entries(file: Path, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines. A last line that was cut off, as by a run that still goes on, is left out."""
    try:
        lines = file.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from None
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            entries.append({field: entry[field] for field in fields})
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{file}, line {number}, is damaged: an object with {', '.join(fields)} is needed") from None
    return entries
