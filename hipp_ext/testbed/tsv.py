"""The questions as VLMEvalKit's TSV files."""

import base64
import csv
import io
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from hipp_ext.files import new_folder
from hipp_ext.testbed.quiz import Question, questions
from hipp_ext.testbed.world import SPLITS

# VLMEvalKit's names of the data sets.
FILES = {"POPE": "POPE.tsv", "ScienceQA": "ScienceQA_TEST.tsv"}
COLUMNS = {
    "POPE": ("index", "image", "question", "answer", "category"),
    "ScienceQA": ("index", "image", "question", "hint", *"ABCD", "answer", "category", "split"),
}


def export(
    out_dir: str | Path,
    splits: Iterable[str] = SPLITS,
    n: int | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write the questions, and return the paths of the files.

    These are OUT/<split>/POPE.tsv and OUT/<split>/ScienceQA_TEST.tsv, with the rows of
    `questions(task, split)`. A picture is in its first row (PNG, base64); later rows contain the
    index of that row instead.

    Args:
        out_dir: the folder OUT; it appears complete, or not at all.
        splits: splits to write.
        n: questions per task and split; None: the default size.
        overwrite: replace an existing folder.

    Raises:
        OutputExistsError: `out_dir` exists and `overwrite` is False.
        DataError: an unknown split.
    """
    tables = {(s, task): questions(task, s, n) for s in splits for task in FILES}
    with new_folder(out_dir, overwrite) as folder:
        for (split, task), rows in tables.items():
            (folder / split).mkdir(exist_ok=True)
            _write(folder / split / FILES[task], COLUMNS[task], rows, split)
    return [Path(out_dir) / split / FILES[task] for split, task in tables]


def _write(path: Path, columns: tuple[str, ...], rows: Iterable[Question], split: str) -> None:
    first: dict[object, int] = {}  # scene -> index of the row with its picture
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(
            file, columns, delimiter="\t", extrasaction="ignore", lineterminator="\n"
        )
        writer.writeheader()
        for row in rows:
            holder = first.setdefault(row.scene, row.index)
            writer.writerow(
                {
                    "index": row.index,
                    "image": _png(row.image) if holder == row.index else holder,
                    "question": row.question,
                    "hint": row.hint,
                    **dict(zip("ABCD", row.options, strict=False)),
                    "answer": row.answer,
                    "category": row.category,
                    "split": split,
                }
            )


def _png(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()
