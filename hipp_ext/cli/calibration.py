"""The options of the commands that calibrate, and the calibration that they stand for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hipp_ext.errors import CalibrationError

if TYPE_CHECKING:
    from hipp_ext.calibration import Calibration

CALIBRATION = "Calibration"
TASKS = ("utility", "robustness")  # those of hipp_ext.calibration, which imports torch
CalibrationFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="Your data: VLMEvalKit .tsv, chats or texts (.jsonl, .json), .txt, or a saved "
        "datasets folder; or twice, as utility=FILE and robustness=FILE. Default: built-in "
        "questions about a toy world.",
        rich_help_panel=CALIBRATION,
    ),
]
ImageFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder that picture paths in FILE start from. Default: the folder of FILE.",
        rich_help_panel=CALIBRATION,
    ),
]
CalibrationRows = Annotated[
    int | None,
    typer.Option(
        min=2,
        metavar="N",
        help="Rows to take, evenly spaced. Default: 128 of FILE; 64 of the built-in questions, "
        "256 for --reconstruct.",
        rich_help_panel=CALIBRATION,
    ),
]
SequenceLength = Annotated[
    int | None,
    typer.Option(
        min=2,
        metavar="L",
        help="Tokens after which a row of FILE is cut. Default: 2048, or the tokenizer's limit.",
        rich_help_panel=CALIBRATION,
    ),
]


@dataclass(frozen=True)
class CalibrationOptions:
    """The values of the four options.

    Attributes:
        files: one path, or utility=PATH and robustness=PATH; None: built-in questions.
        image_folder: folder that picture paths start from.
        rows: number of rows of the file, or of the built-in questions.
        sequence_length: tokens after which a row is cut.

    Raises:
        CalibrationError: the options do not go together.
    """

    files: Sequence[str] | None
    image_folder: Path | None
    rows: int | None
    sequence_length: int | None

    def __post_init__(self) -> None:
        if not self.files and (self.image_folder or self.sequence_length):
            raise CalibrationError(
                "--image-folder and --sequence-length describe the rows of --calibration FILE: "
                "give a file as well."
            )
        files, by_task = self.files or (), self._by_task()
        if len(by_task) not in (0, len(TASKS)) or len(files) > max(1, len(by_task)):
            raise CalibrationError(
                "Give --calibration once, or twice as --calibration utility=FILE --calibration "
                f"robustness=FILE; got {', '.join(files)}."
            )

    def _by_task(self) -> dict[str, str]:
        named = [file.partition("=") for file in self.files or ()]
        return {task: path for task, _, path in named if task in TASKS and path}

    def read(self, model: Any, processor: Any) -> "Calibration | None":
        """The calibration that the options ask for; None: no option was given.

        Raises:
            CalibrationError: the file cannot be used.
            DataError: the file cannot be read, or is damaged.
        """
        from hipp_ext.calibration import Calibration

        if self.files:
            paths: Any = self._by_task() or self.files[0]
            return Calibration.from_file(
                paths,
                processor,
                image_folder=self.image_folder,
                rows=self.rows,
                sequence_length=self.sequence_length,
            )
        return Calibration.of(model, None, processor, self.rows) if self.rows else None
