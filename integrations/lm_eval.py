"""lm-eval (the LM Evaluation Harness): model folders, pruned or not, as `--model hipp`; POPE,
ScienceQA and others as its tasks.

    hipp lm-eval run --model hipp --model_args pretrained=./pruned,dtype=float32 --tasks
    hipp_pope,hipp_scienceqa \\
        --metadata lmu_data=./tsv --apply_chat_template --batch_size 8

lm-eval 0.4 finds tasks in a folder (`--include_path`), but it has no entry points or plugins for
models. So a launcher registers the model and then starts lm-eval's command line, which gets
everything after `hipp lm-eval`. In a script, call `register()` before
`lm_eval.simple_evaluate(model="hipp", ...)`. The tasks also work with lm-eval's own models, without
the launcher: `lm_eval --include_path $(hipp tasks-path) ...`.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from hipp_ext.errors import HippError, MissingExtraError

__all__ = ["TASKS", "main", "register", "tasks_path"]

TASKS = ("hipp_pope", "hipp_repope", "hipp_amber", "hipp_hallusionbench", "hipp_mme")
TASKS += ("hipp_scienceqa", "hipp_scienceqa_val")
_MODEL = "hipp"


def tasks_path() -> Path:
    """The folder of the task files, for lm-eval's `--include_path`."""
    return Path(__file__).with_name("lm_eval_tasks")


def register() -> None:
    """Register the model `hipp` with lm-eval in this process; it can be called again.

    Raises:
        MissingExtraError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.registry import model_registry
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "lm-eval" if error.name == "lm_eval" else str(error.name), "lm-eval"
        ) from error
    # The target is a name, so lm-eval imports the class and torch only when they are needed.
    if _MODEL not in model_registry:
        model_registry.register(_MODEL, target="hipp_ext.integrations.lm_eval_host:HippLM")


def main(argv: Sequence[str] | None = None) -> int:
    """Run lm-eval's command line with the model `hipp` and our tasks.

    Args:
        argv: arguments of lm-eval. Default: those of the process.

    Returns:
        The exit code. 0: success; 2: wrong usage, or wrong input that hipp-ext found; 130: ctrl-C;
            1: any other error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    before = sys.argv
    try:
        if importlib.util.find_spec("lm_eval") is None:
            raise MissingExtraError("lm-eval", "lm-eval")
        register()
        from lm_eval.__main__ import cli_evaluate

        sys.argv = ["lm-eval", *_with_tasks(arguments)]  # lm-eval reads and changes sys.argv itself
        cli_evaluate()
    except SystemExit as stop:  # argparse has printed its message or its help
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except HippError as error:
        print(f"hipp lm-eval: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nhipp lm-eval: interrupted. lm-eval keeps answers only with --use_cache.",
            file=sys.stderr,
        )
        return 130
    finally:
        sys.argv = before
    return 0


def _with_tasks(arguments: list[str]) -> list[str]:
    """`arguments` with our `--include_path`, if they are a run and have neither one nor a
    `--config`.
    """
    options = arguments[1:] if arguments[:1] == ["run"] else arguments
    if not options or not options[0].startswith("-") or {"-h", "--help"} & set(options):
        return arguments
    if {"--include_path", "--config", "-C"} & {option.partition("=")[0] for option in options}:
        return arguments
    return ["run", *options, "--include_path", str(tasks_path())]
