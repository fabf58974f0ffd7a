"""lmms-eval: model folders, pruned or not, as `--model hipp`; POPE and ScienceQA as its tasks.

    hipp lmms-eval --model hipp --model_args pretrained=./pruned,dtype=float32 \\
        --tasks hipp_pope,hipp_scienceqa --lmu-data ./tsv --batch_size 8

lmms-eval finds models by entry points, so its own command knows `--model hipp` as soon as both are
installed, and tasks by folders (`--include_path $(hipp tasks-path lmms-eval)`). The launcher adds
that folder, the option --lmu-data, and an exit code that says whether the evaluation succeeded.
"""

# pyright: reportMissingImports=false

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hipp_ext.errors import DataError, HippError, MissingExtraError

__all__ = ["TASKS", "main", "manifest", "register", "tasks_path"]

TASKS = ("hipp_pope", "hipp_scienceqa", "hipp_scienceqa_val")
_COMMANDS = ("eval", "models", "tasks", "ui", "serve", "power", "version", "tui", "mcp")
_DATA_OPTIONS, _DATA_VARIABLE = ("--lmu-data", "--lmu_data"), "LMUData"


def tasks_path() -> Path:
    """The folder of the task files, for lmms-eval's `--include_path`."""
    return Path(__file__).with_name("lmms_eval_tasks")


def manifest() -> Any:
    """What lmms-eval's entry point `lmms_eval.models` loads: where the model `hipp` is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    # The target is a name, so lmms-eval imports the class and torch only when they are needed.
    return ModelManifest(
        model_id="hipp", chat_class_path="hipp_ext.integrations.lmms_eval_host.HippLMM"
    )


def register() -> None:
    """Register the model `hipp` with lmms-eval in this process, as the entry point does.

    Raises:
        MissingExtraError: lmms-eval is not installed.
    """
    try:
        from lmms_eval.models import MODEL_REGISTRY_V2
    except ModuleNotFoundError as error:
        missing = "lmms-eval" if error.name == "lmms_eval" else str(error.name)
        raise MissingExtraError(missing, "lmms-eval") from error
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run lmms-eval's command line with the model `hipp` and our tasks.

    Args:
        argv: arguments of lmms-eval, and --lmu-data DIR. Default: those of the process.

    Returns:
        The exit code. 0: success; 2: wrong usage, or wrong input that hipp-ext found; 130: ctrl-C;
            1: any other error, after which lmms-eval itself would exit with 0.
    """
    before, data = sys.argv, os.environ.get(_DATA_VARIABLE)
    failures: list[Exception] = []
    try:
        arguments, folder = _without_data(list(sys.argv[1:] if argv is None else argv))
        if importlib.util.find_spec("lmms_eval") is None:
            raise MissingExtraError("lmms-eval", "lmms-eval")
        register()
        from lmms_eval.cli.dispatch import main as dispatch

        if folder is not None:
            os.environ[_DATA_VARIABLE] = folder
        sys.argv = ["lmms-eval", *_with_tasks(arguments)]  # lmms-eval reads sys.argv itself
        with _noted(failures):
            dispatch()
    except SystemExit as stop:  # argparse has printed its message or its help
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except HippError as error:
        print(f"hipp lmms-eval: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nhipp lmms-eval: interrupted. Answers are kept with --use_cache.", file=sys.stderr)
        return 130
    finally:
        sys.argv = before
        os.environ.pop(_DATA_VARIABLE, None)
        if data is not None:
            os.environ[_DATA_VARIABLE] = data
    return int(bool(failures))


@contextlib.contextmanager
def _noted(failures: list[Exception]) -> Iterator[None]:
    """Inside the block errors of an evaluation are noted, which lmms-eval prints and forgets."""
    host: Any = importlib.import_module("lmms_eval.__main__")
    evaluate = host.cli_evaluate_single

    def noting(*args: Any, **kwargs: Any) -> Any:
        try:
            return evaluate(*args, **kwargs)
        except HippError as error:  # the user's, to whom a traceback says nothing
            print(f"hipp lmms-eval: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        except Exception as error:
            failures.append(error)
            raise

    host.cli_evaluate_single = noting
    try:
        yield
    finally:
        host.cli_evaluate_single = evaluate


def _without_data(arguments: list[str]) -> tuple[list[str], str | None]:
    """(arguments without our own option, its value)."""
    for place, argument in enumerate(arguments):
        name, given, value = argument.partition("=")
        if name not in _DATA_OPTIONS:
            continue
        rest = arguments[place + 1 :]
        if not given:
            if not rest:
                raise DataError(f"{name} needs a folder")
            value, *rest = rest
        return [*arguments[:place], *rest], value
    return arguments, None


def _with_tasks(arguments: list[str]) -> list[str]:
    """`arguments` with our `--include_path`, if they are an evaluation that has neither one nor a
    `--config`.
    """
    options = arguments[1:] if arguments[:1] == ["eval"] else arguments
    if not options or options[0] in _COMMANDS or {"-h", "--help"} & set(options):
        return arguments
    if {"--include_path", "--config", "--tui"} & {o.partition("=")[0] for o in options}:
        return arguments
    return [*arguments, "--include_path", str(tasks_path())]
