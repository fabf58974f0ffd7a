"""VLMEvalKit as a library: scores of model folders on its POPE and ScienceQA files.

    evaluate(["./dense", "./pruned"], ["POPE", "ScienceQA_TEST"])  # in a shell: vlmeval --data ...
    --model ... register({"pruned": "./pruned"})                               # in a script that
    uses VLMEvalKit

Prompts and scores are VLMEvalKit's own; `vlmevalkit_run` describes the rest. The command `vlmeval`
starts with this file, which imports nothing slow, so that ctrl-C works from the start.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hipp_ext.evals.predictions import HippVLM
    from hipp_ext.integrations.vlmevalkit_host import register
    from hipp_ext.integrations.vlmevalkit_run import DTYPES, EvalRecord, evaluate

__all__ = ["DTYPES", "EvalRecord", "HippVLM", "evaluate", "main", "register"]

INTERRUPTED = 130
_INTERRUPT_MESSAGE = (
    b"\nvlmeval: interrupted. Earlier answers are kept: run the same command again to continue.\n"
)
_HOMES = {
    "DTYPES": "integrations.vlmevalkit_run",
    "EvalRecord": "integrations.vlmevalkit_run",
    "HippVLM": "evals.predictions",
    "evaluate": "integrations.vlmevalkit_run",
    "register": "integrations.vlmevalkit_host",
    "_import_vlmeval": "integrations.vlmevalkit_host",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"hipp_ext.{_HOMES[name]}"), name.removeprefix("_"))
    globals()[name] = value
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """The command `vlmeval`; see `vlmeval --help`. Returns the exit code."""
    try:
        with prompt_interrupt():
            from hipp_ext.integrations.vlmevalkit_cli import main as run
        return run(argv)
    except KeyboardInterrupt:  # outside of the blocks that handle it
        os.write(2, _INTERRUPT_MESSAGE)
        return INTERRUPTED


@contextlib.contextmanager
def prompt_interrupt() -> Iterator[None]:
    """Let ctrl-C end the process at once in a block that imports, with one line and exit code 130.

    A KeyboardInterrupt is not enough: torch and VLMEvalKit import their parts within `except:`
    clauses that catch it or turn it into an ImportError. Nothing is lost, because the evaluation
    has not started.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is None
    ):
        yield
        return

    def end(*_: Any) -> None:
        os.write(2, _INTERRUPT_MESSAGE)
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
