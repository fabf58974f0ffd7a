"""Tables in the formats that VLMEvalKit's variables PRED_FORMAT and EVAL_FORMAT name."""

import datetime
import io
import os
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from hipp_ext.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

PRED_FORMATS, EVAL_FORMATS = ("xlsx", "tsv", "json"), ("csv", "json")
_VARIABLES = {"prediction": ("PRED_FORMAT", PRED_FORMATS), "score": ("EVAL_FORMAT", EVAL_FORMATS)}


def file_format(kind: str) -> str:
    """The format of files of the kind "prediction" or "score"; the first is the default.

    Raises:
        DataError: the variable names a format that VLMEvalKit does not know.
    """
    variable, known = _VARIABLES[kind]
    found = os.environ.get(variable, "").lower() or known[0]
    if found not in known:
        raise DataError(
            f"the environment variable {variable} is {found!r}; it may be one of {', '.join(known)}"
        )
    return found


def file_bytes(frame: "pd.DataFrame", stem: str, kind: str) -> tuple[str, bytes]:
    """Name and content of the file `stem` with a table in the format for its kind."""
    suffix = file_format(kind)
    if suffix == "xlsx":
        return f"{stem}.xlsx", _xlsx(frame)
    from vlmeval.smp import dump

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"table.{suffix}"
        dump(frame, str(file))
        return f"{stem}.{suffix}", file.read_bytes()


def _xlsx(frame: "pd.DataFrame") -> bytes:
    """As VLMEvalKit writes it, but the same table gives the same bytes, and an answer that begins
    with "=" or "http" stays text. Excel's cells end after 32,767 characters.
    """
    import pandas as pd

    buffer = io.BytesIO()
    options = {"strings_to_formulas": False, "strings_to_urls": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a cell is cut
        with pd.ExcelWriter(
            buffer, engine="xlsxwriter", engine_kwargs={"options": options}
        ) as writer:
            writer.book.set_properties({"created": datetime.datetime(2000, 1, 1)})
            frame.to_excel(writer, index=False)
    return buffer.getvalue()
