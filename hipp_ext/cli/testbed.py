"""`hipp testbed`: train the tiny LLaVA again, write its questions as files."""

from pathlib import Path
from typing import Annotated

import typer

from hipp_ext.cli.console import Overwrite
from hipp_ext.files import require_new

testbed_app = typer.Typer(
    no_args_is_help=True, help="The built-in tiny LLaVA and its picture world."
)


@testbed_app.command("train")
def testbed_train(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the model.")],
    seed: Annotated[int, typer.Option(help="Random seed of weights and data order.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train the tiny LLaVA from nothing, in minutes on two cores.

    Example: `hipp testbed train --out my-testbed`
    """
    from hipp_ext import testbed

    testbed.train(out, seed=seed, overwrite=overwrite)
    typer.echo(str(out))


@testbed_app.command("export")
def testbed_export(
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder for SPLIT/POPE.tsv and SPLIT/ScienceQA_TEST.tsv."),
    ],
    model: Annotated[
        Path | None, typer.Option(help="Save the dense model to this folder as well.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the testbed's questions as VLMEvalKit TSVs, in four disjoint splits.

    The splits are calibration, search, validation and test.

    Example: `hipp testbed export -o data --model dense`, then
    `vlmeval --data POPE --model dense --lmu-data data/test`
    """
    from hipp_ext import testbed
    from hipp_ext.surgery.checkpoint import save_pruned

    if model is not None:
        require_new(model, overwrite)
    testbed.export(out, overwrite=overwrite)
    typer.echo(str(out))
    if model is not None:
        loaded, processor = testbed.load()
        typer.echo(str(save_pruned(loaded, model, processor, overwrite=overwrite)))
