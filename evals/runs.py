"""Reads the results of `vlmeval`: which questions were asked, and what a model answered.

<work-dir>/<model>-<hash>/<data>/run-<key>/ holds predictions.jsonl and questions.jsonl;
<data>/results.json names the last run and its number of questions.
"""

import hashlib
import json
import os
import re
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from hipp_ext.errors import DataError
from hipp_ext.evals.benchmark_tables import groups_of, splits_of
from hipp_ext.evals.benchmarks import BENCHMARKS, benchmark_of
from hipp_ext.evals.prediction_log import read_lines
from hipp_ext.evals.record_types import Strict, checked
from hipp_ext.evals.scienceqa import option_letter
from hipp_ext.evals.tables import CHOICE, YES_NO, Table, read_table, row_options
from hipp_ext.files import write_atomic
from hipp_ext.files.untrusted import read_json

PREDICTIONS, QUESTIONS = "predictions.jsonl", "questions.jsonl"
_MAX_NAME_BYTES = 255 - len("-12345678")  # file name limit of most file systems


@dataclass(frozen=True, kw_only=True)
class AskedQuestion:
    """A question as it was asked.

    Attributes:
        index: index of its row, as text.
        question, answer, category: cells of the row; category is empty if the row has none. For a
            yes/no question, category lists the splits in which it counts.
        image: SHA-256 of the image.
        options: text of each option by its letter; None for a yes/no question.
        benchmark: one of `benchmarks.BENCHMARKS`; empty for another data set.
        group: key of the questions that are counted together; see `benchmark_tables.groups_of`.
    """

    index: str
    question: str
    answer: str
    category: str
    image: Annotated[str, Field(pattern=r"^[\w-]*$")]
    options: dict[str, str] | None
    benchmark: str = ""
    group: str = ""

    @property
    def kind(self) -> str:
        """`YES_NO` or `CHOICE`."""
        return YES_NO if self.options is None else CHOICE

    @property
    def label(self) -> str:
        """What `prediction` returns for a correct answer."""
        return self.answer.lower() if self.kind == YES_NO else self.answer

    @property
    def cluster(self) -> str:
        """A key of the questions that are not independent of this one.

        Yes/no questions about one image form a cluster, in HallusionBench those about an image and
        its edited versions. A multiple-choice question stands alone, because many of them share a
        blank image and have nothing else in common.
        """
        return benchmark_of(self.benchmark).cluster(self) if self.kind == YES_NO else self.index

    def prediction(self, answer: str, rule: str = "vlmeval") -> str:
        """What a model's answer means.

        Args:
            answer: text of the answer.
            rule: one of the rules of the benchmark; multiple choice has one rule only.

        Returns:
            "yes", "no" or "unknown"; or the letter of an option, "Z" where it cannot be read.
        """
        return (
            benchmark_of(self.benchmark).rules[rule](answer)
            if self.kind == YES_NO
            else option_letter(answer, self.options or {})
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """The answers of one model to the questions of one data set, in order; unanswered questions are
    left out.
    """

    model: str
    data: str
    questions: tuple[AskedQuestion, ...]
    answers: tuple[str, ...]


@dataclass
class _Prediction:
    index: str | int
    prediction: str


class _Results(Strict):
    """The fields of results.json that identify the answers it is about."""

    predictions: str
    n: Annotated[int, Field(ge=1)] | None = None


def shown_name(folder: Path) -> str:
    """The name of a model's folder as it was typed, without characters that a file system or
    terminal cannot show.
    """
    name = unicodedata.normalize("NFC", folder.name)
    name = (
        "".join(c if c.isprintable() else "-" for c in name)
        .encode()[:_MAX_NAME_BYTES]
        .decode(errors="ignore")
    )
    return name or "model"


def result_folder(work_dir: Path, model: Path, model_hash: str) -> Path:
    """Folder of the results of a model: its name, as it was typed, and the first 8 digits of its
    hash.
    """
    return work_dir / f"{shown_name(model)}-{model_hash[:8]}"


def run_folder(place: Path, identity: Any) -> Path:
    """Folder below `place` of the answers with this identity, which JSON can hold."""
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return place / f"run-{key[:16]}"


def table_rows(table: Table) -> list[AskedQuestion]:
    """The questions of a checked table."""
    frame = table.frame
    options = [None] * len(frame) if table.kind == YES_NO else row_options(frame)
    categories = frame["category"].tolist() if "category" in frame else [""] * len(frame)
    benchmark, groups = "", [""] * len(frame)
    if table.name in BENCHMARKS:
        benchmark, groups = table.name, groups_of(table.name, frame)
        categories = splits_of(table.name, frame)
    columns = (frame["index"], frame["question"], frame["answer"], categories)
    return [
        AskedQuestion(
            index=str(i),
            question=str(q),
            answer=str(a),
            category=str(c),
            image=image,
            options=None if o is None else {letter: str(text) for letter, text in o.items()},
            benchmark=benchmark,
            group=group,
        )
        for i, q, a, c, image, o, group in zip(*columns, table.images, options, groups, strict=True)
    ]


def write_questions(table: Table, folder: Path) -> None:
    """Write questions.jsonl beside the predictions, so that the run can be read without the TSV."""
    lines = [json.dumps(vars(question)) + "\n" for question in table_rows(table)]
    write_atomic(folder / QUESTIONS, "".join(lines))


def read_runs(path: str | Path, tsv: str | Path | None = None) -> dict[str, Run]:
    """The runs of a predictions file or of the folder of a run, a data set or a model, by the name
    of the data set.

    Args:
        path: the file or folder. A model's folder holds one run per data set, and its hash may be
            left out.
        tsv: the questions, needed if there is no questions.jsonl beside the predictions.

    Raises:
        DataError: there is no run, or one of its files is missing or damaged.
    """
    path = _with_hash(Path(path).expanduser())
    file = path / PREDICTIONS if (path / PREDICTIONS).is_file() else path
    if file.is_file():
        run = _read_run(file, tsv)
        return {run.data: run}
    folders = (
        [path]
        if (path / "results.json").is_file()
        else sorted(f.parent for f in path.glob("*/results.json"))
    )
    if not folders:
        inside = dict.fromkeys(
            sorted(file.parents[1].name for file in path.glob("*/*/results.json"))
        )
        hint = (
            f"name one of the models in it: {', '.join(inside)}"
            if inside
            else "a folder such as outputs/MODEL-HASH is needed, or a file predictions.jsonl "
            "(`hipp perplexity` compares models on your own rows)"
        )
        raise DataError(f"{path} holds no results of `vlmeval`; {hint}")
    return {folder.name: _read_run(_results(folder)[0], tsv) for folder in folders}


def _with_hash(path: Path) -> Path:
    """`path` if it holds results, else the only folder PATH-HASH, else `path`.

    A folder PATH without results may be the one of VLMEvalKit's own files.

    Raises:
        DataError: there are several such folders.
    """
    marks = (PREDICTIONS, "results.json", "*/results.json")
    if path.is_file() or any(next(path.glob(mark), None) for mark in marks):
        return path
    found = [
        p
        for p in sorted(path.parent.glob("*"))
        if re.fullmatch("-[0-9a-f]{8}", p.name[-9:]) and p.name[:-9] == shown_name(path)
    ]
    if len(found) > 1:
        raise DataError(
            f"{path}: several models of this name were evaluated. Name one of "
            f"{', '.join(p.name for p in found)}"
        )
    return found[0] if found else path


def _results(folder: Path) -> tuple[Path, int | None]:
    """The predictions file that results.json names, and the number of questions.

    The folder may have been moved since the path was written, so only the end of the path is used.
    """
    file = folder / "results.json"
    results = checked(_Results, read_json(file), f"{file} is damaged")
    predictions = results["predictions"]
    end = Path(predictions).parts[-2:]
    if len(end) < 2 or set(end) & {"..", "/"} or "\0" in predictions:
        raise DataError(f"{file} is damaged: {predictions[:500]!r} is not a file of predictions")
    return folder.joinpath(*end), results.get("n")


def _asked(predictions: Path) -> int | None:
    """The number of questions that the results count, if results.json names these predictions.

    There may be more answers: batches are asked whole, and a run over all questions may have come
    before.
    """
    try:
        file, n = _results(Path(os.path.realpath(predictions)).parent.parent)
    except DataError:
        return None
    return n if os.path.realpath(file) == os.path.realpath(predictions) else None


def _read_run(predictions: Path, tsv: str | Path | None) -> Run:
    lines = read_lines(predictions, _Prediction, "index, prediction")
    answers = {str(line.index): line.prediction for line, _ in lines}
    asked = _questions(predictions.parent / QUESTIONS, tsv)
    known = {question.index for question in asked}
    if unknown := [index for index in answers if index not in known]:
        raise DataError(
            f"{predictions}: it answers index {unknown[0]}, which is not among the questions"
        )
    answered = tuple(question for question in asked if question.index in answers)
    if not answered:
        raise DataError(f"{predictions} holds no answers")
    answered = answered[: _asked(predictions)]
    place = predictions.resolve().parents
    return Run(
        model=place[2].name if len(place) > 2 else place[0].name,
        data=place[1].name if len(place) > 2 else predictions.stem,
        questions=answered,
        answers=tuple(answers[question.index] for question in answered),
    )


def _questions(file: Path, tsv: str | Path | None) -> list[AskedQuestion]:
    if tsv is not None:
        name = Path(tsv).stem
        with tempfile.TemporaryDirectory() as folder:
            return table_rows(read_table(tsv, folder, name=name if name in BENCHMARKS else None))
    if not file.is_file():
        raise DataError(
            f"{file} is missing, so the questions are unknown. Pass the TSV with --data, or run "
            "the same `vlmeval` command again: it keeps the answers and writes this file"
        )
    lines = read_lines(file, AskedQuestion, "index, question, answer, category, image, options")
    for number, (question, _) in enumerate(lines, start=1):
        if wrong := _wrong(question):
            raise DataError(f"{file}, line {number}, is damaged: {wrong}")
    return [question for question, _ in lines]


def _wrong(question: AskedQuestion) -> str | None:
    """What `tables.read_table` would have refused."""
    if question.benchmark and (question.options or question.benchmark not in BENCHMARKS):
        return f"{question.benchmark!r} is no yes/no benchmark that is known here"
    if question.options is None:
        if question.answer not in ("Yes", "No"):
            return f"the answer is {question.answer!r}; it must be Yes or No"
        return (
            None if all(question.category.split(",")) else f"the category is {question.category!r}"
        )
    return (
        None
        if question.answer in question.options
        else f"the answer is {question.answer!r}, which is not among its options"
    )
