"""What the commands say: results on stdout, the rest on stderr; less of it on request."""

import contextlib
import json
import logging
import os
import re
import shlex
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

# A sentence ends where the next one begins with a capital letter, or with a name in quotes.
_NEXT_SENTENCE = re.compile(r"(?<=[^\s.])\. (?=[A-Z`'\"-])")
_HOSTS = ("transformers", "huggingface_hub", "accelerate", "peft", "compressed_tensors")
# What hosts read when they are imported. A value that the user has set stays.
_HOST_LEVELS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "LOGURU_LEVEL": "ERROR",  # llm-compressor, compressed-tensors
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning)

Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON, and nothing else on stdout.")
]


@dataclass(frozen=True, kw_only=True)
class _Mode:
    quiet: bool = False
    json: bool = False


_AS_USUAL = _Mode()
_mode: ContextVar[_Mode] = ContextVar("mode", default=_AS_USUAL)


@contextlib.contextmanager
def speaking(*, quiet: bool = False, verbose: bool = False) -> Iterator[None]:
    """Context in which commands say what the user asked for.

    Args:
        quiet: only results that are written nowhere else, warnings and errors.
        verbose: also what the library and its hosts log, and their warnings as they come.
    """
    token = _mode.set(_Mode(quiet=quiet))
    try:
        with _library_log(verbose), contextlib.nullcontext() if verbose else _no_host_noise():
            yield
    finally:
        _mode.reset(token)


def only_json(asked: bool) -> None:
    """For the rest of the command `say` is silent, if `asked`: stdout is for `print_json`."""
    _mode.set(replace(_mode.get(), json=asked))


def say(text: str) -> None:
    """Print lines about the work on stdout; nothing with --quiet or --json."""
    for line in text.splitlines() if speaks() else ():
        typer.echo(fitted(line))


def fitted(line: str) -> str:
    """A line that is broken where a terminal ends, between words; unbroken in a pipe."""
    if not sys.stdout.isatty():
        return line
    width = shutil.get_terminal_size().columns
    options: Any = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(line, width, subsequent_indent="  ", **options)


def speaks() -> bool:
    """Whether lines about the work are wanted on stdout."""
    return _mode.get() == _AS_USUAL


def shell(*words: object) -> str:
    """A command as one types it, for `next_command`."""
    return shlex.join(map(str, words))


def next_command(*choices: str) -> None:
    """Print which command comes next, one of them; nothing with --quiet or --json."""
    if speaks():  # unbroken, to be copied
        typer.echo(f"next: {', or '.join(choices)}")


def shows_progress() -> bool:
    """Whether progress is wanted on stderr."""
    return not _mode.get().quiet


def shows_bars() -> bool:
    """Whether progress is wanted that only a terminal can show."""
    return shows_progress() and sys.stderr.isatty()


def print_report(file: Path) -> None:
    """Print a report that a command has written, which is JSON, on stdout."""
    typer.echo(file.read_text(encoding="utf-8").rstrip())


def print_json(values: Any) -> None:
    """Print `values` as JSON on stdout."""
    typer.echo(json.dumps(values, indent=1, allow_nan=False))


def note(line: str) -> None:
    """Print a remark on stderr; nothing with --quiet; under torchrun only in the first process."""
    if shows_progress() and _leads():
        typer.echo(f"hipp: note: {line}", err=True)


def progress(line: str) -> None:
    """Print a line about work that begins on stderr; nothing with --quiet or --json."""
    if speaks() and _leads():
        typer.echo(f"hipp: {line}", err=True)


def warn(line: str) -> None:
    """Print a warning on stderr; under torchrun only in the first process. The command goes on."""
    if _leads():
        _coloured(f"hipp: warning: {line}", "yellow")


def _leads() -> bool:
    return os.environ.get("RANK", "0") == "0"


def show_error(message: str) -> None:
    """Print what was wrong on stderr: the first sentence, and on a second line what to do."""
    first, *rest = _NEXT_SENTENCE.split(" ".join(message.split()))
    _coloured(f"hipp: {first}{'.' * bool(rest)}", "red")
    if rest:
        typer.echo(f"  {'. '.join(rest)}", err=True)


def _coloured(line: str, colour: str) -> None:
    plain = "NO_COLOR" in os.environ or not sys.stderr.isatty()
    typer.secho(line, fg=None if plain else colour, err=True)


@contextlib.contextmanager
def _library_log(verbose: bool) -> Iterator[None]:
    """Context in which the library's log is printed: from INFO on, with `verbose` all of it."""
    logger, handler = logging.getLogger("hipp_ext"), logging.Handler()
    handler.emit = lambda record: _print_record(record)  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _print_record(record: logging.LogRecord) -> None:
    if record.levelno >= logging.WARNING:
        warn(record.getMessage())
    else:
        note(record.getMessage())


@contextlib.contextmanager
def _no_host_noise() -> Iterator[None]:
    """Context in which hosts log errors only, and every UserWarning is one line, shown once."""
    shown = set()

    def show(message: Any, category: type[Warning], *where: Any) -> None:
        if issubclass(category, _FOR_DEVELOPERS):
            return
        if category is not UserWarning:
            return plain(message, category, *where)
        if (line := " ".join(str(message).split())) not in shown:
            shown.add(line)
            warn(line)

    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in _HOSTS}
    unset = [name for name in _HOST_LEVELS if name not in os.environ]
    os.environ.update({name: _HOST_LEVELS[name] for name in unset})
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            plain, warnings.showwarning = warnings.showwarning, show
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
        for name in unset:
            os.environ.pop(name, None)
