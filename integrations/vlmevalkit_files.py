"""Tables of answers in the format that VLMEvalKit's variable PRED_FORMAT names."""

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

FORMATS = ("xlsx", "tsv", "json")
_VARIABLE = "PRED_FORMAT"


def file_format() -> str:
    """The format of files of answers.

    Raises:
        DataError: the variable names a format that VLMEvalKit does not know.
    """
    found = os.environ.get(_VARIABLE, "").lower() or FORMATS[0]
    if found not in FORMATS:
        raise DataError(
            f"the environment variable {_VARIABLE} is {found!r}; it may be one of "
            f"{', '.join(FORMATS)}"
        )
    return found


def file_bytes(frame: "pd.DataFrame") -> bytes:
    """The content of a file with a table, in this format."""
    suffix = file_format()
    if suffix == "xlsx":
        return _xlsx(frame)
    from vlmeval.smp import dump

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"table.{suffix}"
        dump(frame, str(file))
        return file.read_bytes()


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
