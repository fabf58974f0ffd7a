"""`hipp doctor`: what hipp-ext finds in a model folder, and what the next steps will take."""

from typing import Annotated

import typer

from hipp_ext.cli import console, output
from hipp_ext.cli import options as opt
from hipp_ext.errors import CalibrationError

doctor_app = typer.Typer()


@doctor_app.command()
def doctor(
    model: console.ModelArgument,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel="Calibration",
            help="Also say whether this file can calibrate the model: what it holds, and which "
            "rows would be left out. As for `hipp plan`, also as utility=FILE and robustness=FILE.",
        ),
    ] = None,
    image_folder: opt.ImageFolder = None,
    sequence_length: opt.SequenceLength = None,
    rows: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Rows to read of FILE; without it, that the estimates assume."
        ),
    ] = 128,
    tokens: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="L",
            help="Without FILE: tokens of text in a row; a picture's come on top.",
        ),
    ] = 512,
    device: console.Device = None,
    dtype: console.Dtype = None,
    as_json: output.Json = False,
) -> None:
    """Show what can be pruned in a model, what that will take, and what will serve the result.

    Weights are not read, only their shapes; a folder with nothing but the configuration will do.
    Memory and time are estimates: of the unpruned model, on this machine. With `--calibration` the
    estimates are for its rows.

    Examples:

    - `hipp doctor ./llava-1.5-7b-hf`
    - `hipp doctor ./llava-1.5-7b-hf --calibration chats.jsonl --image-folder ./pictures`
    - `hipp doctor ./Qwen3-8B --rows 256 --tokens 1024 --json`
    """
    output.only_json(as_json)
    console.require_model(model)
    console.check_dtype(dtype)
    paths = opt.calibration_paths(calibration)
    if not paths and (image_folder or sequence_length):
        raise CalibrationError("--image-folder and --sequence-length are for --calibration FILE.")
    from hipp_ext.cli.doctor_findings import examine
    from hipp_ext.cli.doctor_text import print_findings
    from hipp_ext.surgery.checkpoint import resolve_device

    found = examine(
        console.model_folder(model),
        rows=rows,
        tokens=tokens,
        device=resolve_device(device),
        dtype=dtype,
        calibration=paths,
        reading={"image_folder": image_folder, "sequence_length": sequence_length},
    )
    if as_json:
        output.print_json(found)
        return
    print_findings(found)
    usable = all(one["usable"] for one in found["calibration"])
    if found["prunable_parameters"] and usable:
        files = [
            word for file in calibration or ["chats.jsonl"] for word in ("--calibration", file)
        ]
        files += ["--image-folder", str(image_folder)] if image_folder else []
        then = ("hipp", "plan", model, *files, "-o", "plan.json")
        output.next_command(output.shell(*then))
