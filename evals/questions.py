"""Questions of a checked TSV for the in-process evaluator, with VLMEvalKit's prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hipp_ext.calibration.chats import choice_prompt
from hipp_ext.evals.tables import YES_NO, Table, row_options
from hipp_ext.files.untrusted import read_picture

if TYPE_CHECKING:
    from PIL import Image


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
    if table.kind == YES_NO:
        asked = [(str(q), ("Yes", "No")) for q in frame["question"]]
    else:
        hints = (
            frame["hint"].where(frame["hint"].notna(), "").tolist()
            if "hint" in frame
            else [""] * len(frame)
        )
        asked = [
            (choice_prompt(str(q), o, str(h)), tuple(o))
            for q, o, h in zip(frame["question"], row_options(frame), hints, strict=True)
        ]
    rows = zip(asked, frame["image_path"], frame["answer"], strict=True)
    return [
        TableQuestion(
            prompt=p,
            image_path=str(i),
            labels=c,
            answer=str(a),
            picture=str(i) if table.kind == YES_NO else None,
        )
        for (p, c), i, a in rows
    ]
