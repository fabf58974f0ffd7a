"""VLMEvalKit's own flags: those that mean the same here, have no effect, or are refused.

`vlmeval` is started by scripts that were written for VLMEvalKit's run.py. A flag that would change
the numbers and cannot be followed ends the command with the reason. One without effect is said to
have none. docs/vlmevalkit.md lists both, as a test checks.
"""

import argparse
import sys
from typing import Any

_DECODING = "decoding is greedy, with temperature 0, so that answers can be compared"
_JUDGE = "no judge model is asked: scoring is by exact matching (--judge exact_matching)"
# name -> (number of values, why it has no effect)
_WITHOUT_EFFECT = {
    "--reuse-aux": (1, "scores are computed from the answers each time"),
    "--ignore": (0, "VLMEvalKit itself ignores it"),
    "--api-mode": (0, "requests to a server are always parallel"),
    "--monitor-interval": (1, "a progress bar is shown"),
    "--judge-api-nproc": (1, "there is no judge"),
    "--judge-retry": (1, "there is no judge"),
    "--judge-timeout": (1, "there is no judge"),
}
_REFUSED = {
    "--config": "name models and data by --model and --data; a file of your own is NAME=PATH",
    "--key": "a key is not written into commands: --api-key-env NAME names a variable with it",
    "--keep-failed": "a question without an answer is an error, and is never scored",
    "--use-vllm": "start `vllm serve FOLDER`, and give its address by --base-url",
    "--use-verifier": _JUDGE,
    "--judge-args": _JUDGE,
    "--judge-base-url": _JUDGE,
    "--judge-key": _JUDGE,
    "--thinker": "answers have at most 16 tokens",
    "--max-tokens": "answers have at most 16 tokens",
    "--temperature": _DECODING,
    "--top-k": _DECODING,
    "--top-p": _DECODING,
    "--repetition-penalty": _DECODING,
    "--extra-body": _DECODING,
    "--custom-prompt": "prompts are those of VLMEvalKit's data sets",
    "--video-llm": "questions are about pictures",
    "--local-media": "pictures are sent in the request",
    "--debug": "use --verbose",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add VLMEvalKit's flags that `vlmeval --help` does not list one by one."""
    for name, (values, _) in _WITHOUT_EFFECT.items():
        parser.add_argument(name, nargs=values, action=_Notice, help=argparse.SUPPRESS)
    for name in _REFUSED:
        parser.add_argument(name, nargs="*", action=_Refuse, help=argparse.SUPPRESS)


class _Notice(argparse.Action):
    """Says on stderr that a flag has no effect, and why."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        (name,) = self.option_strings
        print(f"{parser.prog}: {name} has no effect: {_WITHOUT_EFFECT[name][1]}", file=sys.stderr)


class _Refuse(argparse.Action):
    """Ends the command: the values are not repeated, because one may be a key."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        (name,) = self.option_strings
        parser.error(f"{name} of VLMEvalKit is not followed here: {_REFUSED[name]}")


def judge(text: str) -> str:
    """The value of --judge."""
    if text != "exact_matching":
        raise argparse.ArgumentTypeError(f"{_JUDGE}, not {text}")
    return text
