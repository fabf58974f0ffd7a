"""Reads VLMEvalKit TSVs and names every mistake in the file before a model is loaded.

VLMEvalKit itself finds such mistakes after the last answer, or never: a wrong label only lowers the
score. It also runs `eval` on cells of the columns index, image and image_path, and stores a decoded
image under the index of its row, so that a changed image is not noticed. Here nothing in a file is
executed, and an image is stored under its own hash.
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
from hipp_ext.evals import hallusionbench
from hipp_ext.evals.benchmark_tables import check_benchmark, normalise
from hipp_ext.evals.benchmarks import BENCHMARKS, POPE_LIKE
from hipp_ext.evals.table_pictures import picture_column, store_pictures
from hipp_ext.files.untrusted import TABLE_BYTES, open_plain, shown

if TYPE_CHECKING:
    import pandas as pd

YES_NO, CHOICE = "yes/no", "multiple choice"
KNOWN = dict.fromkeys([*POPE_LIKE, *BENCHMARKS], YES_NO)
KNOWN |= {"ScienceQA_VAL": CHOICE, "ScienceQA_TEST": CHOICE}
ALIASES = {"ScienceQA": "ScienceQA_TEST"}
GROUP_COLUMNS = ("split", "l2-category", "category")
_HOST = "https://opencompass.openxlab.space/"
_OFFICIAL = {  # name -> (where VLMEvalKit gets the file, its md5)
    "POPE": (f"{_HOST}utils/VLMEval", "c12f5acb142f2ef1f85a26ba2fbe41d5"),
    "MME": (f"{_HOST}utils/VLMEval", "b36b43c3f09801f5d368627fb92187c3"),
    "HallusionBench": (f"{_HOST}utils/VLMEval", "0c23ac0dc9ef46832d7a24504f2a0c7c"),
    "AMBER": (
        "https://huggingface.co/datasets/yifanzhang114/AMBER_base64/resolve/main",
        "970d94c0410916166e0a76ba75da7934",
    ),
    "ScienceQA_VAL": (f"{_HOST}utils/benchmarks/ScienceQA", "96320d05e142e585e7204e72affd29f3"),
    "ScienceQA_TEST": (f"{_HOST}utils/benchmarks/ScienceQA", "e42e9e00f9c59a80d8a5db35bc32b71f"),
}
_ROOT_VARIABLE = "LMUData"
_MAX_COLUMNS = 1000
_HEAD_BYTES = 64 << 20  # the header and the first row must end within these
_CELL = re.compile(rb'(?:"[^"]*(?:""[^"]*)*"?)?[^\t\r\n]*')
_MAX_SPLITS = 100  # each is scored with its own bootstrap


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """A checked benchmark file.

    Attributes:
        name: name of the data set, such as "POPE".
        kind: `YES_NO` or `CHOICE`, which decides prompt and scoring.
        path: path of the TSV.
        frame: rows, without the column image and with image_path, the absolute path of each row's
            image.
        images: SHA-256 of each row's image.
        content_hash: SHA-256 of the rows and their images. The name and the layout of the file do
            not change it.
        without_image: number of rows left out because they have no image (multiple choice and
            HallusionBench only, as in VLMEvalKit).
        official: whether the file is the published one, byte for byte; None if there is no
            published one.
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
    """The folder `lmu_data`, else $LMUData, else ~/LMUData, as in VLMEvalKit."""
    return Path(lmu_data or os.environ.get(_ROOT_VARIABLE) or Path.home() / "LMUData").expanduser()


def locate(data: str, lmu_data: str | Path | None = None) -> tuple[str, Path]:
    """Name and path of a benchmark given as a known name or as NAME=PATH.

    Raises:
        DataError: the name is unknown or cannot be the name of a folder, or the file does not
            exist.
    """
    name, given, path = data.partition("=")
    if given:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
            raise DataError(
                f"{data!r}: the name of a data set consists of letters, digits, '_', '.' and '-', "
                "as in mine=FILE"
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
        published = ""
        if name in _OFFICIAL:
            published = f", or get the published file from {_OFFICIAL[name][0]}/{name}.tsv"
        raise DataError(
            f"{name}: there is no {file}. Make one with `hipp data` (from its authors' files) or, "
            f"for POPE and ScienceQA, `hipp testbed export`{published}; its folder is --lmu-data, "
            "else $LMUData, else ~/LMUData"
        )
    return name, file.resolve()


def read_table(path: str | Path, image_folder: str | Path, *, name: str | None = None) -> Table:
    """The checked table of a TSV; its images are written to `image_folder`, each under its own
    hash.

    A file with a column A or B is multiple choice and any other is yes/no, unless `name` is a known
    benchmark. Cells are read as in VLMEvalKit: an empty cell and the texts NA, None and null mean
    that the cell is missing.

    Raises:
        DataError: the file is empty or not a TSV, a column or a cell is missing, an index is
            repeated, an image cannot be decoded or is outside the file's folder, a row has several
            images, or an answer is not among the options of its question. The message names the
            row.
    """
    path = Path(path)
    with open_plain(path, TABLE_BYTES, "table") as file:
        md5 = _check_bytes(path, file)
        frame = _read_tsv(path, file)
    kind = KNOWN.get(name or "") or (CHOICE if {"A", "B"} & set(frame.columns) else YES_NO)
    _check_columns(path, frame, kind)
    _check_cells(path, frame, ["index", "question", "answer"])
    rows = [f"row {shown(index)}" for index in frame["index"]]
    indices = frame["index"].astype(str)
    if repeated := indices[indices.duplicated()].tolist():
        raise DataError(
            f"{path}: index {repeated[0]} occurs more than once ({len(repeated)} rows too many)"
        )
    total = len(frame)
    if kind == YES_NO:
        # VLMEvalKit leaves out rows without an image. They are usual in ScienceQA and
        # HallusionBench, and a mistake elsewhere.
        if name != hallusionbench.NAME:
            _check_cells(path, frame, [picture_column(frame)])
        frame = _check_yes_no(path, frame, rows, name if name in BENCHMARKS else None)
    else:
        frame = _check_choices(path, frame, rows)
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


def published_name(path: str | Path) -> str | None:
    """The name of the published benchmark that the file is, byte for byte; None: it is none."""
    digest = hashlib.md5()
    with open_plain(path, TABLE_BYTES, "table") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return next((n for n, (_, md5) in _OFFICIAL.items() if md5 == digest.hexdigest()), None)


def _check_bytes(path: Path, file: BinaryIO) -> str:
    """The MD5 of the file; DataError if it has null bytes or too many columns.

    Parsers stop at null bytes. pandas takes columns of the first row beyond the header for an index
    with many levels, and each level takes time.
    """
    digest, beginning = hashlib.md5(), bytearray()
    while chunk := file.read(1 << 20):
        if b"\0" in chunk:
            raise DataError(
                f"{path} cannot be read as tab-separated UTF-8 text: it holds null bytes"
            )
        digest.update(chunk)
        if len(beginning) < _HEAD_BYTES:
            beginning += chunk
    file.seek(0)
    at, columns = 0, 0
    while columns <= 1 and at < len(beginning):  # the header
        columns, at = _fields(beginning, at)
    first = 0
    while first <= 1 and at < len(beginning):  # the first row; pandas skips empty lines
        first, at = _fields(beginning, at)
    if max(columns, first) > _MAX_COLUMNS:
        raise DataError(
            f"{path} cannot be read as the table of a benchmark: a row has more than "
            f"{_MAX_COLUMNS:,} cells"
        )
    return digest.hexdigest()


def _fields(text: bytearray, at: int) -> tuple[int, int]:
    """Number of cells of the row that starts at `at`, counted up to the limit, and the start of the
    next row.
    """
    count = 0
    while count <= _MAX_COLUMNS:
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
            # Columns of mixed types are checked cell by cell below.
            warnings.simplefilter("ignore", pd.errors.DtypeWarning)
            frame = pd.read_csv(file, sep="\t", compression=None)
    except pd.errors.EmptyDataError:
        raise DataError(f"{path} is empty") from None
    except (ValueError, OverflowError, OSError) as error:  # the first includes ParserError
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
            f"{path}: missing column {', '.join(missing)}; a {kind} table needs it, and this one "
            f"has {shown(', '.join(map(str, frame.columns)), 500)}"
        )


def _check_cells(path: Path, frame: "pd.DataFrame", columns: list[str]) -> None:
    for column in columns:
        missing = frame[column].isna().tolist()
        if any(missing):
            where = frame["index"].tolist()[missing.index(True)]
            raise DataError(
                f"{path}: row {shown(where)} has no {column} ({sum(missing)} such rows)"
            )


def _check_yes_no(
    path: Path, frame: "pd.DataFrame", rows: list[str], benchmark: str | None
) -> "pd.DataFrame":
    _check_cells(path, frame, ["category"])
    frame = normalise(benchmark, frame) if benchmark else frame
    for row, answer in zip(rows, frame["answer"], strict=True):
        if answer not in ("Yes", "No"):
            raise DataError(
                f"{path}: {row} has the answer {answer!r}; it must be Yes or No, in this spelling "
                "(a multiple-choice table has option columns A, B, ...)"
            )
    if benchmark:
        return check_benchmark(benchmark, path, frame, rows)
    # VLMEvalKit would read "random, popular" as two splits, one of them named " popular".
    lists = [
        [split.strip() for split in str(cell).split(",") if split.strip()]
        for cell in frame["category"]
    ]
    for row, splits, cell in zip(rows, lists, frame["category"], strict=True):
        if not splits or not isinstance(cell, str) or "overall" in splits:
            raise DataError(
                f"{path}: {row} has the category {cell!r}; it must be comma-separated split names, "
                "such as random,popular; the name overall is reserved"
            )
    if len(distinct := {split for splits in lists for split in splits}) > _MAX_SPLITS:
        raise DataError(
            f"{path}: the column category names {len(distinct):,} splits; at most {_MAX_SPLITS} "
            "can be scored"
        )
    return frame.assign(category=[",".join(splits) for splits in lists])


def _check_choices(path: Path, frame: "pd.DataFrame", rows: list[str]) -> "pd.DataFrame":
    for row, answer, options in zip(rows, frame["answer"], row_options(frame), strict=True):
        if answer not in options:
            raise DataError(
                f"{path}: {row} has the answer {answer!r}; its options are "
                f"{', '.join(options) or 'none'} (VLMEvalKit takes an option with the text NA, "
                "None or null for a missing one)"
            )
    groups = [column for column in GROUP_COLUMNS if column in frame]
    unused = [column for column in groups if all(frame[column].isna().tolist())]
    _check_cells(path, frame, [column for column in groups if column not in unused])
    return frame.drop(columns=unused)


def row_options(frame: "pd.DataFrame") -> list[dict[str, object]]:
    """The options of each row, as text by letter; missing ones are left out."""
    letters = [letter for letter in string.ascii_uppercase if letter in frame]
    present = {letter: frame[letter].notna().tolist() for letter in letters}
    texts = {letter: frame[letter].tolist() for letter in letters}
    return [
        {letter: texts[letter][row] for letter in letters if present[letter][row]}
        for row in range(len(frame))
    ]
