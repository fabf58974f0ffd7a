"""The command `hipp`: thin wrappers over the library, one function per command.

What a command needs is imported when it runs: help, errors in options and completion come without waiting for torch.
"""

import os
import sys
from typing import Annotated

import typer

from hipp_ext import __version__
from hipp_ext.cli.evals import evals_app
from hipp_ext.cli.latency import latency_app
from hipp_ext.cli.planning import planning_app
from hipp_ext.cli.recover import recover_app
from hipp_ext.cli.robust import robust_app
from hipp_ext.cli.testbed import testbed_app
from hipp_ext.errors import HippError
from hipp_ext.files.temporaries import FULL, system_error

app = typer.Typer(
    name="hipp",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Pruning plans for vision-language models: state a preference, get a smaller model that still sees.",
)
app.add_typer(planning_app)
app.add_typer(recover_app)
app.add_typer(evals_app)
app.add_typer(latency_app)
app.add_typer(robust_app, name="robust")
app.add_typer(testbed_app, name="testbed")

INTERRUPTED = 130


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hipp-ext {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Pruning plans for vision-language models: state a preference, get a smaller model that still sees."""


def main() -> None:
    """Entry point: exit code 0 on success, 2 for bad input or a full disk, 130 on ctrl-C, 1 for anything else."""
    _quiet_transformers()
    try:
        app(standalone_mode=True)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer makes it of a KeyboardInterrupt
            typer.secho(
                "hipp: interrupted. Fits, training and studies keep what they finished: the same command goes on from there.",
                err=True,
            )
        raise
    except Exception as error:
        if (line := _in_one_line(error)) is None:
            raise
        typer.secho(f"hipp: {line}", fg="red", err=True)
        sys.exit(2)


def _in_one_line(error: Exception) -> str | None:
    """What to say of an error that the user or the system caused; None of one that we did."""
    number, name = system_error(error)
    if not isinstance(error, HippError):
        if number in FULL or (isinstance(error, OSError) and number is not None):
            return os.strerror(number) + (f": {name}" if name else "")
        if not isinstance(error, OSError):
            return None
    return " ".join(str(error).split()) or type(error).__name__


def _quiet_transformers() -> None:
    """Its bars for loading and saving say nothing about our progress. The variable is read when transformers is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
