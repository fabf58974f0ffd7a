"""What the tables of MME, AMBER and HallusionBench must hold beyond those of POPE, and what their
questions have in common.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hipp_ext.errors import DataError
from hipp_ext.evals import amber, hallusionbench, mme
from hipp_ext.evals.hallusionbench import places
from hipp_ext.evals.table_pictures import MAX_REFERENCE
from hipp_ext.files.untrusted import shown

if TYPE_CHECKING:
    import pandas as pd

PICTURE = "picture"  # column of MME's tables: the picture within its subtask


def normalise(name: str, frame: "pd.DataFrame") -> "pd.DataFrame":
    """The table with the answers Yes and No; AMBER's may be in small letters, as in VLMEvalKit."""
    if name != amber.NAME:
        return frame
    return frame.assign(answer=[str(answer).capitalize() for answer in frame["answer"]])


def check_benchmark(
    name: str, path: Path, frame: "pd.DataFrame", rows: Sequence[str]
) -> "pd.DataFrame":
    """The checked table, for MME with the column `PICTURE`.

    Raises:
        DataError: a category is unknown; for MME, a picture does not have two questions in its
            subtask; for HallusionBench, an index or an l2-category is not in VLMEvalKit's form.
    """
    known = {mme.NAME: mme.SUBTASKS, amber.NAME: tuple(amber.KINDS)}.get(name)
    for row, category in zip(rows, frame["category"], strict=True):
        if known and category not in known:
            raise DataError(
                f"{path}: {row} has the category {shown(category)!r}; those of {name} are "
                f"{', '.join(known)}"
            )
    if name == mme.NAME:
        return _with_pictures(path, frame)
    if name == hallusionbench.NAME:
        _check_places(path, frame, rows)
    return frame


def _with_pictures(path: Path, frame: "pd.DataFrame") -> "pd.DataFrame":
    frame = frame.assign(**{PICTURE: _picture_names(frame)})
    asked = Counter(zip(frame["category"], frame[PICTURE], strict=True))
    wrong = [(key, n) for key, n in asked.items() if n != mme.PER_PICTURE]
    if wrong:
        (subtask, picture), n = wrong[0]
        raise DataError(
            f"{path}: MME asks two questions about every picture of a subtask, and the picture "
            f"{shown(picture, 60)!r} of {subtask} has {n} ({len(wrong)} such pictures). The column "
            "image_path tells pictures of equal content apart"
        )
    return frame


def _picture_names(frame: "pd.DataFrame") -> list[str]:
    """A name of the picture of each row: its image_path, else a hash of its image."""
    if "image_path" in frame:
        return frame["image_path"].astype(str).tolist()
    cells = frame["image"].astype(str).tolist()
    by_index = dict(zip(frame["index"].astype(str), cells, strict=True))
    whole = [by_index.get(cell, cell) if len(cell) <= MAX_REFERENCE else cell for cell in cells]
    return [hashlib.sha256(cell.encode("utf-8", "replace")).hexdigest()[:16] for cell in whole]


def _check_places(path: Path, frame: "pd.DataFrame", rows: Sequence[str]) -> None:
    if "l2-category" not in frame:
        raise DataError(f"{path}: missing column l2-category; HallusionBench needs it")
    for row, index, part, kind in zip(
        rows, frame["index"], frame["category"], frame["l2-category"], strict=True
    ):
        if places(str(index)) is None:
            raise DataError(
                f"{path}: {row} is not an index of HallusionBench such as "
                "HallusionBench_VD_math_3_1_0: set, figure and question are its last numbers"
            )
        for cell in (part, kind):
            if not isinstance(cell, str) or not cell or "," in cell or cell == "overall":
                raise DataError(f"{path}: {row} has the category {shown(cell)!r}")


def splits_of(name: str, frame: "pd.DataFrame") -> list[str]:
    """The splits in which each question counts, comma-separated."""
    categories = frame["category"].astype(str).tolist()
    if name == mme.NAME:
        return [f"{mme.total_of(category)},{category}" for category in categories]
    if name == amber.NAME:
        return [",".join(amber.KINDS[category]) for category in categories]
    kinds = frame["l2-category"].tolist()
    return [f"{part},{kind}" for part, kind in zip(categories, kinds, strict=True)]


def groups_of(name: str, frame: "pd.DataFrame") -> list[str]:
    """A key of the questions that are counted together: about one picture of a subtask (MME) or one
    figure (HallusionBench); else empty.
    """
    if name == mme.NAME:
        pictures = frame[PICTURE].tolist()
        return [
            f"{own}/{picture}" for own, picture in zip(frame["category"], pictures, strict=True)
        ]
    if name != hallusionbench.NAME:
        return [""] * len(frame)
    keys = []
    for index, kind in zip(frame["index"], frame["l2-category"], strict=True):
        place = places(str(index))
        assert place is not None  # check_benchmark has run
        keys.append(f"{kind}_{place[0]}_{place[1]}")
    return keys
