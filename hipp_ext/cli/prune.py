"""`hipp prune`: a model and a plan -> a smaller model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hipp_ext.cli import console, output
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
    as_json: output.Json = False,
) -> None:
    """Prune a model by a plan and save it with its processor.

    Examples:

    - `hipp prune ./llava-1.5-7b-hf plan.json -o ./pruned`
    - `hipp prune ./llava-1.5-7b-hf plan.json -o ./pruned --reconstruct --calibration chats.jsonl`
    - `vlmeval --data POPE --model ./pruned`
    """
    output.only_json(as_json)
    from hipp_ext.groups import left_whole_lines
    from hipp_ext.integrations.serving import check_serving
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
    pruned = prune_model(
        loaded,
        plan,
        inplace=True,
        reconstruct=reconstruct,
        calibration=read_data(loaded, processor),
        processor=processor,
        progress=output.shows_progress(),
    )
    made: Any = pruned
    made.hipp_plan = made.hipp_plan.after(console.command_line())
    save_pruned(pruned, out, processor, overwrite=overwrite)
    after = sum(p.numel() for p in pruned.parameters())
    verdicts = check_serving(out)
    left, then = left_whole_lines(plan.left_whole), _recover_command(model, out, calibration)
    if as_json:
        output.print_json(
            {
                "folder": str(out),
                "parameters_before": before,
                "parameters": after,
                "left_whole": left,
                "runtimes": {v.runtime: list(v.reasons) for v in verdicts},
                "next": then,
            }
        )
        return
    for line in left:
        output.say(f"left whole: {line}")
    output.say(
        f"{out}: {before / 1e6:.2f}M -> {after / 1e6:.2f}M parameters "
        f"({100 * (1 - after / before):.1f}% removed in total)"
    )
    output.say(served(out, verdicts))
    output.next_command(then)


def _recover_command(model: str, out: Path, calibration: Sequence[str] | None) -> str:
    """Fine-tuning, with the dense model as its teacher, on the file of the calibration."""
    data = calibration[0] if calibration and len(calibration) == 1 else "chats.jsonl"
    learnt = ("--teacher", console.model_folder(model), "--data", data, "--holdout", "0.1")
    return output.shell("hipp", "recover", out, *learnt, "-o", "recovered")


def served(folder: Path, verdicts: Sequence[Any]) -> str:
    """A line on which runtimes take the folder."""
    taking = ", ".join(v.runtime for v in verdicts if not v.reasons)
    others = ", ".join(v.runtime for v in verdicts if v.reasons)
    why = f"; `hipp check-serving {folder}` says why not by {others}" if others else ""
    return f"can be served by {taking}{why}"
