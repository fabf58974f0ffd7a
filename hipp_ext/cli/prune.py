"""`hipp prune`: a model and a plan -> a smaller model."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from hipp_ext.cli import console
from hipp_ext.cli import options as opt
from hipp_ext.errors import CalibrationError
from hipp_ext.files import require_new

prune_app = typer.Typer()


@prune_app.command()
def prune(
    model: console.ModelArgument,
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan file.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the pruned model.")
    ],
    reconstruct: Annotated[
        bool,
        typer.Option(
            "--reconstruct",
            help="Fit the remaining weights to calibration activations by least squares, without "
            "training. Default: only remove.",
        ),
    ] = False,
    overwrite: console.Overwrite = False,
    calibration: opt.CalibrationFiles = None,
    image_folder: opt.ImageFolder = None,
    calibration_rows: opt.CalibrationRows = None,
    sequence_length: opt.SequenceLength = None,
    device: Annotated[
        str | None,
        console.hardware_option(
            help="Device: cpu, cuda, ..., or auto (spread over all GPUs). Default: cpu; with "
            "--reconstruct the GPU if there is one."
        ),
    ] = None,
) -> None:
    """Prune a model by a plan and save it with its processor.

    Examples:

    - `hipp prune ./llava-1.5-7b-hf plan.json -o ./pruned`
    - `hipp prune ./llava-1.5-7b-hf plan.json -o ./pruned --reconstruct --calibration chats.jsonl`
    - `vlmeval --data POPE --model ./pruned`
    """
    from hipp_ext.groups import left_whole_lines
    from hipp_ext.plan import PruningPlan
    from hipp_ext.surgery.checkpoint import save_pruned
    from hipp_ext.surgery.prune import prune as prune_model

    read_data = opt.read_calibration(calibration, image_folder, calibration_rows, sequence_length)
    if not reconstruct and (calibration or calibration_rows):
        raise CalibrationError("Calibration options are for --reconstruct: give it as well.")
    console.require_model(model)
    plan = PruningPlan.load(plan_file)
    require_new(out, overwrite)
    console.require_apart(out, Path(console.model_folder(model)), plan_file)
    loaded, processor = console.load_model(
        model, device if reconstruct or device else "cpu", spread=True
    )
    before = sum(p.numel() for p in loaded.parameters())
    with _reconstruction_log():
        pruned = prune_model(
            loaded,
            plan,
            inplace=True,
            reconstruct=reconstruct,
            calibration=read_data(loaded, processor),
            processor=processor,
        )
    save_pruned(pruned, out, processor, overwrite=overwrite)
    for line in left_whole_lines(plan.left_whole):
        typer.echo(f"left whole: {line}")
    after = sum(p.numel() for p in pruned.parameters())
    typer.echo(
        f"{out}: {before / 1e6:.2f}M -> {after / 1e6:.2f}M parameters "
        f"({100 * (1 - after / before):.1f}% removed in total)"
    )
    typer.echo(served(out))


def served(folder: Path) -> str:
    """A line on which runtimes take the folder."""
    from hipp_ext.integrations.serving import check_serving

    verdicts = check_serving(folder)
    taking = ", ".join(v.runtime for v in verdicts if not v.reasons)
    others = ", ".join(v.runtime for v in verdicts if v.reasons)
    why = f"; `hipp check-serving {folder}` says why not by {others}" if others else ""
    return f"can be served by {taking}{why}"


@contextlib.contextmanager
def _reconstruction_log() -> Iterator[None]:
    """Context in which the user sees how many layers the reconstruction improved."""
    logger = logging.getLogger("hipp_ext.surgery.reconstruct")
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: typer.echo(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
