"""`hipp recover precompute`: what the dense model says about the training data, written once."""

from pathlib import Path
from typing import Annotated

import typer

from hipp_ext.cli import recover_options as options
from hipp_ext.cli.console import (
    Device,
    Dtype,
    ModelArgument,
    load_model,
    model_folder,
    require_apart,
    require_model,
    require_run,
)
from hipp_ext.cli.output import next_command, note, say, shell, shows_progress, warn

precompute_app = typer.Typer()


@precompute_app.command("precompute")
def precompute_command(
    model: ModelArgument,
    data: Annotated[
        Path, typer.Option(metavar="FILE", help="The file that `hipp recover --data` will get.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for what the model says.")],
    image_folder: options.ImageFolder = None,
    sequence_length: options.SequenceLength = None,
    top_k: Annotated[
        int, typer.Option(min=1, help="Tokens kept at each position, 6 bytes each.")
    ] = 64,
    temperature: options.Temperature = 1.0,
    positions: options.PositionsOption = "answers",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 8,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Write down what the dense model says about every row of the training data.

    Training then needs the pruned model alone in memory, with the same temperature and positions.
    An interrupted run goes on when the same command is repeated.

    Examples:

    `hipp recover precompute ./dense --data chats.jsonl -o ./teacher`

    `hipp recover ./pruned --teacher ./teacher --data chats.jsonl -o ./recovered`
    """
    from hipp_ext.calibration.reading import listed
    from hipp_ext.recover import FileData
    from hipp_ext.recover.precompute import precompute

    require_model(model)
    require_run(out)
    require_apart(out, Path(model_folder(model)), data)
    loaded, processor = load_model(model, device, dtype)
    rows = FileData(
        data,
        processor,
        image_folder=image_folder,
        sequence_length=sequence_length,
        batch_size=batch_size,
    )
    teacher = precompute(
        loaded,
        rows,
        out,
        top_k=top_k,
        temperature=temperature,
        positions=positions,  # type: ignore[arg-type]
        processor=processor,
        progress=shows_progress(),
        log=note,
    )
    if left_out := [f"row {n}: {why}" for n, why in sorted(rows.skipped.items())]:
        warn(f"{len(left_out)} rows of {data} were left out: {listed(left_out)}")
    found = teacher.header
    say(f"{out}: {found.top_k} tokens at each of {found.places:,} positions of {found.rows:,} rows")
    learn = ("hipp", "recover", "pruned", "--teacher", out, "--data", data, "-o", "recovered")
    next_command(shell(*learn))
