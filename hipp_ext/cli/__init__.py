"""The command `hipp`: thin wrappers over the library, one function per command.

What a command needs is imported when it runs: help, errors in options and completion come without waiting for torch.
"""

import os
import sys

import typer

from hipp_ext.cli.bench import bench_app
from hipp_ext.cli.evals import evals_app
from hipp_ext.cli.planning import planning_app
from hipp_ext.cli.recover import recover_app
from hipp_ext.cli.robust import robust_app
from hipp_ext.cli.testbed import testbed_app
from hipp_ext.errors import HippError

app = typer.Typer(
    name="hipp", no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    help="Pruning plans for vision-language models: state a preference, get a smaller model that still sees.",
)  # fmt: skip
app.add_typer(planning_app)
app.add_typer(recover_app)
app.add_typer(evals_app)
app.add_typer(bench_app, name="bench")
app.add_typer(robust_app, name="robust")
app.add_typer(testbed_app, name="testbed")

INTERRUPTED = 130


def main() -> None:
    """Entry point: exit code 0 on success, 2 for bad input, 130 on ctrl-C, 1 for anything else."""
    _quiet_transformers()
    try:
        app(standalone_mode=True)
    except HippError as error:
        typer.secho(f"hipp: {error}", fg="red", err=True)
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer makes it of a KeyboardInterrupt
            typer.secho(
                "hipp: interrupted. Fits, training and studies keep what they finished: the same command goes on from there.",
                err=True,
            )
        raise


def _quiet_transformers() -> None:
    """Its bars for loading and saving say nothing about our progress. The variable is read when transformers is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
