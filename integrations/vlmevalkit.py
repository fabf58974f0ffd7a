"""VLMEvalKit as a library: model folders and its POPE and ScienceQA files in, VLMEvalKit's numbers and ours out.

    evaluate(["./dense", "./pruned"], ["POPE", "ScienceQA_TEST"])   # or, in a shell: vlmeval --data ... --model ...
    register({"pruned": "./pruned"})                                # in a script of your own on top of VLMEvalKit

Prompts and scores are VLMEvalKit's own; see `vlmevalkit_run` for what is ours. This file is what the command `vlmeval` starts
with, so it imports nothing that takes time: ctrl-C is answered from the first moment.
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
_INTERRUPTION = b"\nvlmeval: interrupted. Answers that were there before are kept: the same command goes on from them.\n"
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
    except KeyboardInterrupt:  # between two things
        os.write(2, _INTERRUPTION)
        return INTERRUPTED


@contextlib.contextmanager
def prompt_interrupt() -> Iterator[None]:
    """For a block that imports: ctrl-C ends the process at once, with one line and exit code 130.

    A KeyboardInterrupt would not do: torch and VLMEvalKit import their parts within `except:` clauses that swallow it, or make
    an ImportError of it. Nothing is lost, since nothing has begun.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is None
    ):
        yield
        return

    def end(*_: Any) -> None:
        os.write(2, _INTERRUPTION)
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
