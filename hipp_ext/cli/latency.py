"""`hipp latency`: what a model and its pruned versions cost to run."""

from pathlib import Path
from typing import Annotated

import typer

from hipp_ext.cli.console import Device, Dtype, Overwrite, check_dtype, model_folder
from hipp_ext.errors import DataError
from hipp_ext.files import require_new_file

latency_app = typer.Typer()


@latency_app.command("latency")
def latency(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Model folders, dense first, or `testbed`."),
    ],
    plan: Annotated[
        list[Path] | None,
        typer.Option(help="Also measure the first model pruned by this plan. Can be repeated."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of prompts in a batch.")] = 1,
    tokens: Annotated[
        int, typer.Option(min=1, help="Prompt length of a model without pictures.")
    ] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate per run.")] = 33,
    repeats: Annotated[int, typer.Option(min=2, help="Runs that count, after two warm-ups.")] = 9,
    seed: Annotated[int, typer.Option(help="Random seed of pictures and prompts.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write the result to this JSON file.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure first-token time, time per further token, peak memory and FLOPs.

    The first model is compared with the others. `hipp report` reads the file of `--out`.

    Examples:

    `hipp latency ./llava-1.5-7b-hf ./pruned --dtype bfloat16 -o latency.json`

    `hipp latency testbed --plan plan.json`
    """
    import shlex
    import sys

    from hipp_ext.evals.generation import Workload
    from hipp_ext.evals.latency import run

    check_dtype(dtype)
    if out is not None:
        require_new_file(out, overwrite)
    folders = {Path(m).resolve().name or m: model_folder(m) for m in models}
    if len(folders) < len(models):
        raise DataError(f"two folders of one name: {', '.join(models)}. Rename one")
    run(
        folders,
        plan or (),
        Workload(rows=rows, tokens=tokens, new_tokens=new_tokens, repeats=repeats, seed=seed),
        device=device,
        dtype=dtype,
        command=shlex.join(["hipp", *sys.argv[1:]]),
        out=out,
    )
