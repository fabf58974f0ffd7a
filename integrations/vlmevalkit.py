"""VLMEvalKit as a library: scores of models on its POPE and ScienceQA files.

    evaluate(["./dense", "./pruned"], ["POPE", "ScienceQA_TEST"])
    evaluate(ServedVLM("http://localhost:8000/v1"), "POPE")
    register({"pruned": "./pruned"})  # in a script that uses VLMEvalKit

Prompts and scores are VLMEvalKit's own; `vlmevalkit_run` describes the rest. The command `vlmeval`
starts with this file, which imports nothing slow, so that ctrl-C works from the start.
"""

import os
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hipp_ext.integrations.vlmevalkit_interrupt import INTERRUPTED, MESSAGE, prompt_interrupt

if TYPE_CHECKING:
    from hipp_ext.evals.hipp_vlm import HippVLM
    from hipp_ext.evals.served import ServedVLM
    from hipp_ext.integrations.vlmevalkit_host import register
    from hipp_ext.integrations.vlmevalkit_job import DTYPES
    from hipp_ext.integrations.vlmevalkit_run import EvalRecord, evaluate

__all__ = ["DTYPES", "EvalRecord", "HippVLM", "ServedVLM", "evaluate", "main", "register"]

_HOMES = {
    "DTYPES": "integrations.vlmevalkit_job",
    "EvalRecord": "integrations.vlmevalkit_run",
    "HippVLM": "evals.hipp_vlm",
    "ServedVLM": "evals.served",
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
        os.write(2, MESSAGE)
        return INTERRUPTED
