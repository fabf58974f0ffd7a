"""The command `hipp`: thin wrappers over the library, one function per command.

A command imports what it needs when it runs, so that help and completion do not wait for torch.
"""

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hipp_ext import __version__
from hipp_ext.cli.chair import chair_app
from hipp_ext.cli.check_serving import check_serving_app
from hipp_ext.cli.compare import compare_app
from hipp_ext.cli.data_benchmarks import data_app
from hipp_ext.cli.demo import demo_app
from hipp_ext.cli.doctor import doctor_app
from hipp_ext.cli.export import export_app
from hipp_ext.cli.fit import fit_app
from hipp_ext.cli.front import front_app
from hipp_ext.cli.hosts import hosts_app
from hipp_ext.cli.latency import latency_app
from hipp_ext.cli.output import show_error, speaking
from hipp_ext.cli.perplexity import perplexity_app
from hipp_ext.cli.plan import plan_app
from hipp_ext.cli.prune import prune_app
from hipp_ext.cli.recover_group import recover_group
from hipp_ext.cli.report import report_app
from hipp_ext.cli.robust import robust_app
from hipp_ext.cli.shrink import shrink_app
from hipp_ext.cli.testbed import testbed_app
from hipp_ext.errors import HippError
from hipp_ext.files.temporaries import FULL, system_error

WRONG, INTERRUPTED = 2, 130  # exit codes
EPILOG = """Exit codes: 0 success; 1 an error of hipp-ext itself, with a traceback; 2 wrong input, a
missing file or package, full disk or memory; 130 interrupted. Plans, fits, recoveries, evaluations
and studies resume when the same command is run again. `hipp COMMAND --help` shows examples.
`vlmeval --help` is about benchmarks."""
NO_MEMORY = (
    "The memory of the device is full. Choose another --device, a smaller --dtype, or fewer or "
    "shorter rows; `hipp doctor MODEL` estimates what is needed."
)
_OF_ALL_COMMANDS = ("--quiet", "-q", "--verbose", "-v")


class HippGroup(TyperGroup):
    """The commands, whose arguments may be followed by options of `hipp` itself."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # The arguments of hosts are their own.
        ends = ("lm-eval", "lmms-eval", "--")
        end = next((i for i, word in enumerate(args) if word in ends), len(args))
        first = [word for word in args[:end] if word in _OF_ALL_COMMANDS]
        rest = [word for word in args[:end] if word not in _OF_ALL_COMMANDS]
        return super().parse_args(ctx, [*first, *rest, *args[end:]])


app = typer.Typer(
    name="hipp",
    cls=HippGroup,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)
# In order of use, which is the order of the help.
for panel, commands in {
    "Start": {"": (doctor_app, demo_app)},
    "Plan and prune": {"": (plan_app, prune_app, fit_app, front_app)},
    "Recover": {"recover": (recover_group,), "": (shrink_app,)},
    "Evaluate": {
        "": (report_app, compare_app, perplexity_app, chair_app, hosts_app),
        "data": (data_app,),
    },
    "Serve": {"": (check_serving_app, latency_app), "export": (export_app,)},
    "More": {"robust": (robust_app,), "testbed": (testbed_app,)},
}.items():
    for name, apps in commands.items():
        for one in apps:
            for command in one.registered_commands if not name else ():
                command.rich_help_panel = panel
            app.add_typer(one, name=name or None, rich_help_panel=panel)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hipp-ext {__version__}")
        raise typer.Exit


@app.callback()
def hipp(
    context: typer.Context,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print only results, warnings and errors.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Also print the logs of hipp-ext and of its hosts."),
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Structured pruning for vision-language and language models.

    You state a preference and get a smaller model that still sees.

    First steps: `hipp doctor MODEL`, `hipp plan MODEL`, `hipp prune MODEL plan.json -o pruned`.
    """
    context.with_resource(speaking(quiet=quiet, verbose=verbose))


def main() -> None:
    """Entry point. Exit codes: see EPILOG."""
    # Transformers' bars for loading and saving say nothing about our progress. The variable is
    # read when transformers is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app(sys.argv[1:] or ["--help"], standalone_mode=True)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer turns KeyboardInterrupt into this exit code
            typer.secho(
                "hipp: interrupted. Plans, fits, training and studies keep what they finished: run "
                "the same command again to resume.",
                err=True,
            )
        raise
    except Exception as error:
        if (message := _of_user_or_system(error)) is None:
            raise
        show_error(message)
        sys.exit(WRONG)


def _of_user_or_system(error: Exception) -> str | None:
    """The message of an error that the user or the system caused; None for an error of ours."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for its name
        return NO_MEMORY
    number, name = system_error(error)
    if not isinstance(error, HippError):
        if number in FULL or (isinstance(error, OSError) and number is not None):
            return os.strerror(number) + (f": {name}" if name else "")
        if not isinstance(error, OSError):
            return None
    return str(error) or type(error).__name__
