"""VLMEvalKit TSV in, checked table out: every mistake in the file is named before a model is loaded.

VLMEvalKit itself finds such mistakes after the last answer, or never: a wrong label only lowers the score. It also
runs `eval` on cells of the columns index, image and image_path, and keeps a decoded picture under the row's index, so
that a changed picture is not seen. Here nothing in a file is executed, and a picture is kept under its own hash.
"""

import hashlib
import os
import re
import string
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from hipp_ext.errors import DataError
from hipp_ext.evals.pictures import picture_column, store_pictures
from hipp_ext.files.untrusted import TABLE_BYTES, open_plain, shown

if TYPE_CHECKING:
    import pandas as pd

YES_NO, CHOICE = "yes/no", "multiple choice"
KNOWN = {"POPE": YES_NO, "ScienceQA_VAL": CHOICE, "ScienceQA_TEST": CHOICE}
ALIASES = {"ScienceQA": "ScienceQA_TEST"}
GROUP_COLUMNS = ("split", "l2-category", "category")
_OFFICIAL = {  # name -> (where VLMEvalKit gets the file, its md5)
    "POPE": ("utils/VLMEval/POPE.tsv", "c12f5acb142f2ef1f85a26ba2fbe41d5"),
    "ScienceQA_VAL": (
        "utils/benchmarks/ScienceQA/ScienceQA_VAL.tsv",
        "96320d05e142e585e7204e72affd29f3",
    ),
    "ScienceQA_TEST": (
        "utils/benchmarks/ScienceQA/ScienceQA_TEST.tsv",
        "e42e9e00f9c59a80d8a5db35bc32b71f",
    ),
}
_HOST = "https://opencompass.openxlab.space/"
_ROOT_VARIABLE = "LMUData"
_MOST_COLUMNS = 1000
_BEGINNING = 64 << 20  # bytes in which header and first row end
_CELL = re.compile(rb'(?:"[^"]*(?:""[^"]*)*"?)?[^\t\r\n]*')
_MOST_SPLITS = 100  # each is scored, with a bootstrap of its own


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """A checked benchmark file.

    Attributes:
        name: what the user calls it, such as "POPE".
        kind: `YES_NO` or `CHOICE`, which decides prompt and scoring.
        path: the TSV.
        frame: its rows, without the column image and with image_path, the absolute path of each row's picture.
        images: SHA-256 of each row's picture.
        content_hash: SHA-256 of the rows and their pictures; not of the file, so its name and layout do not matter.
        without_image: rows left out because they have no picture (multiple choice only, as VLMEvalKit does).
        official: whether the file is the published one, byte for byte; None where there is no published one.
    """

    name: str
    kind: str
    path: Path
    frame: "pd.DataFrame"
    images: tuple[str, ...]
    content_hash: str
    without_image: int
    official: bool | None


def data_root(lmu_data: str | Path | None = None) -> Path:
    """`lmu_data`, else $LMUData, else ~/LMUData: where VLMEvalKit looks too. Never created."""
    return Path(lmu_data or os.environ.get(_ROOT_VARIABLE) or Path.home() / "LMUData").expanduser()


def locate(data: str, lmu_data: str | Path | None = None) -> tuple[str, Path]:
    """Name and path of a benchmark given as a known name or as NAME=PATH.

    Raises:
        DataError: the name is not known, is not fit for a folder, or there is no such file.
    """
    name, given, path = data.partition("=")
    if given:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
            raise DataError(
                f"{data!r}: a data set's name is of letters, digits, '_', '.' and '-', as in mine=FILE"
            )
        if not Path(path).expanduser().is_file():
            raise DataError(f"{data!r}: there is no file {path!r}")
        return ALIASES.get(name, name), Path(path).expanduser().resolve()
    name = ALIASES.get(data, data)
    if name not in KNOWN:
        known = ", ".join([*KNOWN, *ALIASES])
        raise DataError(
            f"unknown data set {data!r}. Known: {known}; or give your own file as NAME=PATH"
        )
    file = data_root(lmu_data) / f"{name}.tsv"
    if not file.is_file():
        raise DataError(
            f"{name}: there is no {file}. Make one with `hipp data` (from COCO, POPE's or ScienceQA's files) or "
            f"`hipp testbed export`, or get the published file from "
            f"{_HOST}{_OFFICIAL[name][0]}; its folder is --lmu-data, else $LMUData, else ~/LMUData"
        )
    return name, file.resolve()


def read_table(path: str | Path, image_folder: str | Path, *, name: str | None = None) -> Table:
    """The checked table of a TSV; its pictures are written to `image_folder`, each under its own hash.

    A file that has a column A or B is multiple choice, any other is yes/no, unless `name` is a known benchmark.
    Cells are read as VLMEvalKit reads them: an empty cell, and one that says NA, None or null, is missing.

    Raises:
        DataError: the file is empty or not a TSV, lacks a column or a cell, repeats an index, has a picture that
            cannot be decoded, several pictures or one outside the file's folder, or an answer that its question does not
            offer. The message names the row.
    """
    path = Path(path)
    with open_plain(path, TABLE_BYTES, "table") as file:
        md5 = _check_bytes(path, file)
        frame = _read_tsv(path, file)
    kind = KNOWN.get(name or "") or (CHOICE if {"A", "B"} & set(frame.columns) else YES_NO)
    _check_columns(path, frame, kind)
    _check_cells(path, frame, ["index", "question", "answer"])
    rows = [f"row {shown(index)}" for index in frame["index"]]
    if repeated := frame["index"].astype(str)[frame["index"].astype(str).duplicated()].tolist():
        raise DataError(
            f"{path}: index {repeated[0]} occurs more than once ({len(repeated)} rows too many)"
        )
    frame = (_check_yes_no if kind == YES_NO else _check_choices)(path, frame, rows)
    total = len(frame)
    if (
        kind == YES_NO
    ):  # VLMEvalKit leaves out rows without a picture: usual in ScienceQA, a mistake in POPE
        _check_cells(path, frame, [picture_column(frame)])
    frame, images = store_pictures(path, frame, Path(image_folder))
    text = frame.drop(columns="image_path").assign(image=list(images)).to_csv(index=False)
    official = md5 == _OFFICIAL[name][1] if name in _OFFICIAL else None
    return Table(
        name=name or path.stem,
        kind=kind,
        path=path,
        frame=frame,
        images=images,
        content_hash=hashlib.sha256(text.encode("utf-8", "replace")).hexdigest(),
        without_image=total - len(frame),
        official=official,
    )


def _check_bytes(path: Path, file: BinaryIO) -> str:
    """The MD5 of the file, when it has no null byte, at which parsers stop or stumble, and no more columns than a benchmark.

    pandas takes columns beyond those of the header for an index of many levels if the first row has them, and each takes time.
    """
    digest, beginning = hashlib.md5(), bytearray()
    while chunk := file.read(1 << 20):
        if b"\0" in chunk:
            raise DataError(
                f"{path} cannot be read as tab-separated UTF-8 text: it holds null bytes"
            )
        digest.update(chunk)
        if len(beginning) < _BEGINNING:
            beginning += chunk
    file.seek(0)
    at, columns = 0, 0
    while columns <= 1 and at < len(beginning):  # the header
        columns, at = _fields(beginning, at)
    first = 0
    while first <= 1 and at < len(beginning):  # the first row; pandas skips empty lines
        first, at = _fields(beginning, at)
    if max(columns, first) > _MOST_COLUMNS:
        raise DataError(
            f"{path} cannot be read as the table of a benchmark: a row has more than {_MOST_COLUMNS:,} cells"
        )
    return digest.hexdigest()


def _fields(text: bytearray, at: int) -> tuple[int, int]:
    """How many cells the row that begins at `at` has, and where the next row begins; counting stops at too many."""
    count = 0
    while count <= _MOST_COLUMNS:
        count += 1
        end = _CELL.match(text, at)
        at = (end.end() if end else len(text)) + 1
        if text[at - 1 : at] != b"\t":
            break
    return count, at


def _read_tsv(path: Path, file: BinaryIO) -> "pd.DataFrame":
    import pandas as pd

    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", pd.errors.DtypeWarning
            )  # mixed columns are checked cell by cell below
            frame = pd.read_csv(file, sep="\t", compression=None)
    except pd.errors.EmptyDataError:
        raise DataError(f"{path} is empty") from None
    except (
        ValueError,
        OverflowError,
        OSError,
    ) as error:  # ParserError and UnicodeDecodeError are ValueErrors
        raise DataError(f"{path} cannot be read as tab-separated UTF-8 text: {error}") from error
    if not len(frame):
        raise DataError(f"{path} is empty: it has a header and no rows")
    if not isinstance(frame.index, pd.RangeIndex):
        raise DataError(f"{path}: rows have more cells than the header has columns")
    return frame


def _check_columns(path: Path, frame: "pd.DataFrame", kind: str) -> None:
    needed = ["index", "question", "answer", *(["category"] if kind == YES_NO else ["A", "B"])]
    missing = [column for column in needed if column not in frame]
    if not {"image", "image_path"} & set(frame.columns):
        missing.append("image (or image_path)")
    if missing:
        raise DataError(
            f"{path}: missing column {', '.join(missing)}; a {kind} table has it, this one has "
            f"{shown(', '.join(map(str, frame.columns)), 500)}"
        )


def _check_cells(path: Path, frame: "pd.DataFrame", columns: list[str]) -> None:
    for column in columns:
        missing = frame[column].isna().tolist()
        if any(missing):
            where = frame["index"].tolist()[missing.index(True)]
            raise DataError(
                f"{path}: row {shown(where)} has no {column} ({sum(missing)} such rows)"
            )


def _check_yes_no(path: Path, frame: "pd.DataFrame", rows: list[str]) -> "pd.DataFrame":
    _check_cells(path, frame, ["category"])
    for row, answer in zip(rows, frame["answer"], strict=True):
        if answer not in ("Yes", "No"):
            raise DataError(
                f"{path}: {row} has the answer {answer!r}; it must be Yes or No, in this spelling "
                "(a multiple-choice table has option columns A, B, ...)"
            )
    # VLMEvalKit would take "random, popular" for two splits of which one is called " popular".
    lists = [
        [split.strip() for split in str(cell).split(",") if split.strip()]
        for cell in frame["category"]
    ]
    for row, splits, cell in zip(rows, lists, frame["category"], strict=True):
        if not splits or not isinstance(cell, str) or "overall" in splits:
            raise DataError(
                f"{path}: {row} has the category {cell!r}; it must be a comma list of split names, "
                "such as random,popular; overall is taken"
            )
    if len(distinct := {split for splits in lists for split in splits}) > _MOST_SPLITS:
        raise DataError(
            f"{path}: the column category names {len(distinct):,} splits; {_MOST_SPLITS} can be scored"
        )
    return frame.assign(category=[",".join(splits) for splits in lists])


def _check_choices(path: Path, frame: "pd.DataFrame", rows: list[str]) -> "pd.DataFrame":
    for row, answer, options in zip(rows, frame["answer"], row_options(frame), strict=True):
        if answer not in options:
            raise DataError(
                f"{path}: {row} has the answer {answer!r}; its options are {', '.join(options) or 'none'} "
                "(VLMEvalKit takes an option that reads NA, None or null for a missing one)"
            )
    groups = [column for column in GROUP_COLUMNS if column in frame]
    unused = [column for column in groups if all(frame[column].isna().tolist())]
    _check_cells(path, frame, [column for column in groups if column not in unused])
    return frame.drop(columns=unused)


def row_options(frame: "pd.DataFrame") -> list[dict[str, object]]:
    """Letter to text for each row, leaving out missing ones."""
    letters = [letter for letter in string.ascii_uppercase if letter in frame]
    present = {letter: frame[letter].notna().tolist() for letter in letters}
    texts = {letter: frame[letter].tolist() for letter in letters}
    return [
        {letter: texts[letter][row] for letter in letters if present[letter][row]}
        for row in range(len(frame))
    ]
