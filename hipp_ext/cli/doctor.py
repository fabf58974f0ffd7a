"""`hipp doctor`: what hipp-ext finds in a model folder, and what the next steps will take."""

from typing import Annotated

import typer

from hipp_ext.cli import console, output

doctor_app = typer.Typer()


@doctor_app.command()
def doctor(
    model: console.ModelArgument,
    rows: Annotated[
        int, typer.Option(min=1, metavar="N", help="Rows of calibration that the estimates assume.")
    ] = 128,
    tokens: Annotated[
        int,
        typer.Option(min=1, metavar="L", help="Tokens of text in a row; a picture's come on top."),
    ] = 512,
    device: console.Device = None,
    dtype: console.Dtype = None,
    as_json: output.Json = False,
) -> None:
    """Show what can be pruned in a model, what that will take, and what will serve the result.

    Weights are not read, only their shapes; a folder with nothing but the configuration will do.
    Memory and time are estimates: of the unpruned model, on this machine.

    Examples:

    - `hipp doctor ./llava-1.5-7b-hf`
    - `hipp doctor ./Qwen3-8B --rows 256 --tokens 1024 --json`
    """
    output.only_json(as_json)
    console.require_model(model)
    console.check_dtype(dtype)
    from hipp_ext.cli.doctor_findings import examine
    from hipp_ext.cli.doctor_text import print_findings
    from hipp_ext.surgery.checkpoint import resolve_device

    found = examine(
        console.model_folder(model),
        rows=rows,
        tokens=tokens,
        device=resolve_device(device),
        dtype=dtype,
    )
    if as_json:
        output.print_json(found)
        return
    print_findings(found)
    if found["prunable_parameters"]:
        then = ("hipp", "plan", model, "--calibration", "chats.jsonl", "-o", "plan.json")
        output.next_command(output.shell(*then))
