"""Questions of a checked TSV for the in-process evaluator, with VLMEvalKit's prompts."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hipp_ext.evals.benchmarks import benchmark_of
from hipp_ext.evals.runs import table_rows
from hipp_ext.evals.tables import Table, read_table
from hipp_ext.files.untrusted import read_picture
from hipp_ext.prompts import choice_prompt

if TYPE_CHECKING:
    from PIL import Image

Q = TypeVar("Q")


@dataclass(frozen=True, kw_only=True)
class TableQuestion:
    """A row of a table, with the fields that `Evaluator` reads.

    `picture` is the same for all yes/no questions about one image. It is None for multiple choice,
    where many questions may share a blank image and have nothing else in common.
    """

    prompt: str
    image_path: str
    labels: Sequence[str]
    answer: str
    picture: str | None

    @property
    def image(self) -> "Image.Image":
        """The image, RGB."""
        return read_picture(self.image_path)


def table_questions(table: Table) -> list[TableQuestion]:
    """The questions of a table, in order."""
    frame = table.frame
    hints = frame["hint"].where(frame["hint"].notna(), "") if "hint" in frame else [""] * len(frame)
    return [
        TableQuestion(
            prompt=choice_prompt(row.question, row.options, str(hint))
            if row.options
            else row.question + benchmark_of(row.benchmark).ending,
            image_path=str(path),
            labels=tuple(row.options or ("Yes", "No")),
            answer=row.answer,
            picture=None if row.options else str(path),
        )
        for row, hint, path in zip(table_rows(table), hints, frame["image_path"], strict=True)
    ]


def read_questions(
    path: str | Path, images: str | Path, n: int | None = None
) -> list[TableQuestion]:
    """Questions of a VLMEvalKit TSV, for `Evaluator`; see `drawn`.

    Args:
        path: the TSV, of yes/no questions or multiple choice.
        images: folder that its pictures are unpacked to.
        n: number of questions; None: all.

    Raises:
        DataError: the file cannot be read, or has a mistake; the message says where.
    """
    return drawn(table_questions(read_table(path, images)), n)


def drawn(questions: Sequence[Q], n: int | None, seed: int = 0) -> list[Q]:
    """`n` of the questions at random, in their order; all of them if there are fewer.

    Tables list the questions about one picture, and those of one kind, together: the first
    hundred of POPE are about 16 pictures, and of one kind.

    Args:
        questions: the questions.
        n: number of questions; None: all.
        seed: random seed.
    """
    if n is None or n >= len(questions):
        return list(questions)
    return [questions[i] for i in sorted(random.Random(seed).sample(range(len(questions)), n))]
