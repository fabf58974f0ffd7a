"""The questions as VLMEvalKit's tables, and a sheet of pictures to look at."""

import functools
import io
import itertools
from pathlib import Path
from typing import Any

from PIL import Image

from hipp_ext.evals.data.writing import Picture, write_table
from hipp_ext.evals.studies.smolworld import packages
from hipp_ext.evals.studies.smolworld.painting import paint
from hipp_ext.evals.studies.smolworld.quiz import TASKS, Question, questions
from hipp_ext.evals.studies.smolworld.scenes import SIZE, Scene, World
from hipp_ext.files import write_atomic
from hipp_ext.testbed import SPLITS

FILES = {"POPE": "POPE.tsv", "ScienceQA": "ScienceQA_TEST.tsv", "Captions": "Captions.tsv"}
COLUMNS, ROWS, GAP = 8, 6, 4  # of the sheet


def export(world: World, out: Path, n: int | None = None, *, overwrite: bool = False) -> list[Path]:
    """Write OUT/<split>/POPE.tsv, ScienceQA_TEST.tsv and Captions.tsv; the paths are returned.

    An interrupted export goes on where it stopped. The column `objects` of captions names what is
    in the picture, for CHAIR.

    Args:
        world: the world.
        out: the folder.
        n: questions per task and split; None: the default sizes.
        overwrite: replace tables of another world.

    Raises:
        OutputExistsError: another table is there, and `overwrite` is False.
    """
    return [
        write_table(
            out / split / FILES[task],
            [_row(q, task, split) for q in asked],
            [_picture(q) for q in asked],
            source={"world": "smolworld", "split": split, "packages": packages.digest()},
            overwrite=overwrite,
        )
        for split in SPLITS
        for task in TASKS
        for asked in [questions(world, task, split, n)]
    ]


def sheet(world: World, split: str) -> bytes:
    """A PNG of the first scenes of a split, side by side."""
    cell = 2 * SIZE + GAP
    image = Image.new("RGB", (COLUMNS * cell, ROWS * cell), "white")
    for number, scene in enumerate(itertools.islice(world.stream(split), COLUMNS * ROWS)):
        row, column = divmod(number, COLUMNS)
        image.paste(paint(scene).resize((2 * SIZE, 2 * SIZE)), (column * cell, row * cell))
    return _png(image)


def write_sheets(world: World, out: Path) -> None:
    """Write OUT/<split>.png for every split."""
    for split in SPLITS:
        write_atomic(out / f"{split}.png", sheet(world, split))


def _row(question: Question, task: str, split: str) -> dict[str, Any]:
    row: dict[str, Any] = {"index": question.index, "question": question.question}
    row |= dict(zip("ABCD", question.options, strict=False))
    row |= {"answer": question.answer, "category": question.category, "split": split}
    if task == "Captions":
        assert question.scene is not None
        row["objects"] = ", ".join(question.scene.present)
    return row


def _picture(question: Question) -> Picture:
    read = functools.partial(_bytes, question.scene)
    return Picture(name=question.picture or "blank", stamp=(0, 0), read=read)


def _bytes(scene: Scene | None) -> bytes:
    return _png(paint(scene))


def _png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
