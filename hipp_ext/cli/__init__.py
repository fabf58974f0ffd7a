"""The command `hipp`: thin wrappers over the library, one function per command.

A command imports what it needs when it runs, so that help and completion do not wait for torch.
"""

import os
import sys
from typing import Annotated

import typer

from hipp_ext import __version__
from hipp_ext.cli.check_serving import check_serving_app
from hipp_ext.cli.console import plain_warnings
from hipp_ext.cli.demo import demo_app
from hipp_ext.cli.evals import evals_app
from hipp_ext.cli.export import export_app
from hipp_ext.cli.fit import fit_app
from hipp_ext.cli.front import front_app
from hipp_ext.cli.latency import latency_app
from hipp_ext.cli.plan import plan_app
from hipp_ext.cli.prune import prune_app
from hipp_ext.cli.recover_group import recover_group
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
)
for commands in (demo_app, plan_app, fit_app, front_app, prune_app):
    app.add_typer(commands)
app.add_typer(recover_group, name="recover")
app.add_typer(evals_app)
app.add_typer(latency_app)
app.add_typer(check_serving_app)
app.add_typer(export_app, name="export")
app.add_typer(robust_app, name="robust")
app.add_typer(testbed_app, name="testbed")

INTERRUPTED = 130


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hipp-ext {__version__}")
        raise typer.Exit


@app.callback()
def hipp(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Pruning plans for vision-language models.

    You state a preference and get a smaller model that still sees.
    """
    context.with_resource(plain_warnings())


def main() -> None:
    """Entry point. Exit codes: 0 success, 2 bad input or full disk, 130 ctrl-C, 1 other errors."""
    # Transformers' bars for loading and saving say nothing about our progress. The variable is
    # read when transformers is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app(standalone_mode=True)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer turns KeyboardInterrupt into this exit code
            typer.secho(
                "hipp: interrupted. Fits, training and studies keep what they finished: run the "
                "same command again to resume.",
                err=True,
            )
        raise
    except Exception as error:
        if (line := _in_one_line(error)) is None:
            raise
        typer.secho(f"hipp: {line}", fg="red", err=True)
        sys.exit(2)


def _in_one_line(error: Exception) -> str | None:
    """The message of an error that the user or the system caused; None for an error of ours."""
    number, name = system_error(error)
    if not isinstance(error, HippError):
        if number in FULL or (isinstance(error, OSError) and number is not None):
            return os.strerror(number) + (f": {name}" if name else "")
        if not isinstance(error, OSError):
            return None
    return " ".join(str(error).split()) or type(error).__name__
