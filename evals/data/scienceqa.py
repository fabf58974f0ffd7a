"""Makes VLMEvalKit's ScienceQA_VAL.tsv and ScienceQA_TEST.tsv from ScienceQA as its authors or the
hub distribute it.

Only questions with an image are written, 2097 and 2017 of the published ones, because VLMEvalKit
leaves out the others.

Source: arXiv 2209.09513 and github.com/lupantech/ScienceQA (problems.json, pid_splits.json,
images/SPLIT/ID/image.png); the hub's parquet files have the same fields, and images as {bytes,
path}.
"""

import functools
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hipp_ext.errors import DataError
from hipp_ext.evals.data.parquet import ParquetProblems
from hipp_ext.evals.data.writing import Picture, file_pictures, write_table
from hipp_ext.files import content_hash
from hipp_ext.files.untrusted import read_json, shown, the_only_one

TABLES = {"val": "ScienceQA_VAL", "test": "ScienceQA_TEST"}
_TEXTS = ("question", "choices", "answer", "hint", "topic", "subject")
# pandas, and so VLMEvalKit, reads these cells as missing: the option would be lost.
_MISSING = {"None", "<NA>", "#N/A", "#N/A N/A", "#NA", "N/A", "NA", "n/a", "NULL", "null"}
_MISSING |= {"NaN", "-NaN", "nan", "-nan", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"}


def write_scienceqa(
    source: str | Path,
    out_dir: str | Path,
    splits: Sequence[str] = tuple(TABLES),
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> list[Path]:
    """Write one TSV per split ("val", "test") to `out_dir`; returns their paths.

    The index of a row is the id of the problem, or its row number in the split if the data has no
    ids. The topic becomes the category and the subject the l2-category. An option with the text
    None, NA or similar gets a full stop, because VLMEvalKit would take it for a missing one.

    Args:
        source: folder with problems.json, pid_splits.json and images, or with the hub's parquet
            files.
        out_dir: folder of the TSVs, such as $LMUData.
        splits: splits to write.
        overwrite: replace existing files.
        progress: show progress bars on stderr.

    Raises:
        DataError: `source` holds no problems, a problem is malformed, or an image is missing or
            broken.
        OutputExistsError: another file exists, and `overwrite` is False.
        MissingExtraError: parquet files need pyarrow.
    """
    source = Path(source).expanduser()
    if unknown := [split for split in splits if split not in TABLES]:
        raise DataError(f"unknown split {unknown[0]!r}; known: {', '.join(TABLES)}")
    read = _read_problems if (source / "problems.json").is_file() else _read_parquet
    written = []
    for split in splits:
        problems, pictures, files = read(source, split)
        rows, rewritten = _rows(problems, split)
        made = {
            "made_by": "hipp data scienceqa",
            "split": split,
            "options_with_a_stop": rewritten,
            "files": {file.name: content_hash(file) for file in files},
        }
        out = Path(out_dir) / f"{TABLES[split]}.tsv"
        written.append(
            write_table(out, rows, pictures, source=made, overwrite=overwrite, progress=progress)
        )
    return written


# (index, problem) pairs, the image of each, and the files that they come from.
Problems = tuple[list[tuple[int, Mapping[str, Any]]], list[Picture], list[Path]]


def _read_problems(source: Path, split: str) -> Problems:
    problems, splits = (read_json(source / name) for name in ("problems.json", "pid_splits.json"))
    if (
        not isinstance(problems, dict)
        or not isinstance(splits, dict)
        or not isinstance(splits.get(split), list)
    ):
        raise DataError(
            f"{source}: pid_splits.json has no list {split!r}, or problems.json has no problems "
            "by id"
        )
    found, names = [], []
    for listed in splits[split]:
        pid = str(listed) if isinstance(listed, str | int) else ""
        problem = problems.get(pid)
        if not isinstance(problem, dict) or not pid.isdecimal() or len(pid) > 18:
            raise DataError(
                f"{source}: pid_splits.json lists problem {shown(repr(listed), 60)}, which "
                "problems.json does not have"
            )
        if problem.get("image"):
            image, part = (
                the_only_one(problem["image"], f"{source}: problem {pid}"),
                problem.get("split", split),
            )
            if not isinstance(image, str) or not isinstance(part, str):
                raise DataError(f"{source}: problem {pid}: the image and the split must be texts")
            found.append((int(pid), problem))
            names.append(f"{part}/{pid}/{image}")
    _require_some(found, source, split, len(splits[split]))
    files = [source / "problems.json", source / "pid_splits.json"]
    return found, file_pictures(source / "images", names), files


def _read_parquet(source: Path, split: str) -> Problems:
    found, pictures, total = [], [], 0
    files = _parquet_files(source, split)
    for file in files:
        status, images = file.stat(), ParquetProblems(file, _TEXTS)
        problems = images.problems()
        for row in images.rows_with_picture():
            found.append((total + row, problems[row]))
            read, stamp = functools.partial(images.read, row), (status.st_size, status.st_mtime_ns)
            pictures.append(Picture(name=f"{file.name}, row {row}", stamp=stamp, read=read))
        total += len(problems)
    _require_some(found, source, split, total)
    return found, pictures, files


def _parquet_files(source: Path, split: str) -> list[Path]:
    """The parquet files of a split: SPLIT-00000-of-00001.parquet, SPLIT.parquet or
    SPLIT/0000.parquet, at any depth.
    """
    names = {"val": ("validation", "val"), "test": ("test",)}[split]
    found = sorted(
        file
        for file in source.rglob("*.parquet")
        if file.stem.partition("-")[0] in names
        or (file.stem.isdecimal() and file.parent.name in names)
    )
    if not found:
        raise DataError(
            f"{source} holds neither problems.json (with pid_splits.json and images) nor parquet "
            f"files of the split {names[0]}, such as {names[0]}-00000-of-00001.parquet"
        )
    if len(folders := {file.parent for file in found}) > 1:
        several = ", ".join(str(folder.relative_to(source)) for folder in sorted(folders))
        raise DataError(
            f"{source} holds several versions of the split {split}: {several}. Name one of these "
            "folders"
        )
    return found


def _require_some(found: Sequence[object], source: Path, split: str, total: int) -> None:
    if not found:
        raise DataError(
            f"{source}: none of the {total} questions of the split {split} has a picture; nothing "
            "to write"
        )


def _rows(
    problems: Sequence[tuple[int, Mapping[str, Any]]], split: str
) -> tuple[list[dict[str, object]], int]:
    """The rows, with the same option columns, and the number of options that got a full stop."""
    checked = [(index, *_checked(index, problem)) for index, problem in problems]
    letters = string.ascii_uppercase[: max(len(choices) for _, choices, _, _ in checked)]
    rows, rewritten = [], 0
    for index, choices, answer, texts in checked:
        options = [text + "." if text in _MISSING else text for text in choices]
        rewritten += sum(text in _MISSING for text in choices)
        rows.append(
            {
                "index": index,
                "question": texts["question"],
                "hint": texts["hint"],
                **dict.fromkeys(letters, ""),
                **dict(zip(letters, options, strict=False)),
                "answer": letters[answer],
                "category": texts["topic"],
                "l2-category": texts["subject"],
                "split": split,
            }
        )
    return rows, rewritten


def _checked(index: int, problem: Mapping[str, Any]) -> tuple[list[str], int, dict[str, str]]:
    """The options, the answer and the texts of a problem; DataError if something is wrong."""
    choices, answer = problem.get("choices"), problem.get("answer")
    if (
        not isinstance(choices, list)
        or not 2 <= len(choices) <= 26
        or not all(isinstance(c, str) and c for c in choices)
    ):
        raise DataError(
            f"problem {index}: the choices must be 2 to 26 texts, and are {shown(choices, 300)}"
        )
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(
            f"problem {index}: the answer is {shown(repr(answer), 60)}; it must be the number of "
            f"one of {len(choices)} choices"
        )
    texts = {name: problem.get(name) or "" for name in ("question", "hint", "topic", "subject")}
    for name in ("question", "topic", "subject"):
        if not isinstance(texts[name], str) or not texts[name]:
            raise DataError(f"problem {index} has no {name}")
    if not isinstance(texts["hint"], str):
        raise DataError(
            f"problem {index}: the hint must be a text, and is {shown(texts['hint'], 60)}"
        )
    return choices, answer, texts
