"""The options of the commands that calibrate, and what they stand for."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hipp_ext.errors import CalibrationError

if TYPE_CHECKING:
    from hipp_ext.calibration import Calibration

CalibrationFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="Your own data: VLMEvalKit .tsv, chats or texts as .jsonl or .json, .txt, or a saved "
        "datasets folder; utility=FILE and robustness=FILE give each task its own. Default: "
        "built-in questions about a toy world.",
    ),
]
ImageFolder = Annotated[
    Path | None,
    typer.Option(
        "--image-folder",
        metavar="DIR",
        help="Folder that picture paths in FILE start from; default: the folder of FILE.",
    ),
]
CalibrationRows = Annotated[
    int | None,
    typer.Option(
        "--calibration-rows",
        min=2,
        help="Number of rows of FILE, evenly spaced; default: 128. Without FILE, number of "
        "built-in questions; default: those of the planner, else 64.",
    ),
]
SequenceLength = Annotated[
    int | None,
    typer.Option(
        "--sequence-length",
        min=2,
        help="Tokens after which a row of FILE is cut; default: 2048, or the tokenizer's limit.",
    ),
]


def read_calibration(
    files: Sequence[str] | None,
    processor: Any,
    image_folder: Path | None = None,
    rows: int | None = None,
    sequence_length: int | None = None,
) -> "Calibration | None":
    """The calibration that the options ask for; None: no file was given.

    Args:
        files: one path, or utility=PATH and robustness=PATH.
        processor: processor of the model, or its tokenizer.
        image_folder, rows, sequence_length: as for `Calibration.from_file`.

    Raises:
        CalibrationError: the options do not go together, or the file cannot be used.
        DataError: the file cannot be read, or is damaged.
    """
    if not files:
        if image_folder is not None or sequence_length is not None:
            raise CalibrationError(
                "--image-folder and --sequence-length are about the rows of --calibration FILE: "
                "give a file as well."
            )
        return None
    import warnings

    from hipp_ext.calibration import TASKS, Calibration

    named = [file.partition("=") for file in files]
    by_task: Any = {task: path for task, _, path in named if task in TASKS and path}
    if len(by_task) not in (0, len(TASKS)) or len(files) != max(1, len(by_task)):
        raise CalibrationError(
            "Give --calibration once, or twice as --calibration utility=FILE --calibration "
            f"robustness=FILE; got {', '.join(files)}."
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        calibration = Calibration.from_file(
            by_task or files[0],
            processor,
            image_folder=image_folder,
            rows=rows,
            sequence_length=sequence_length,
        )
    for warning in caught:
        typer.secho(f"hipp: warning: {warning.message}", fg="yellow", err=True)
    return calibration
