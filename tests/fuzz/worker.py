"""The process that reads damaged files: `python -m fuzz.worker PLACE`.

Each line on stdin is a job, as JSON; out come {} when its case begins, then the result.

From its first job on, an audit hook notes what reading a file must never do: start a process, open
    a socket, run code that lies
in the folder, unpickle, ask on the terminal, write or read elsewhere. What is noted is also
refused, so that it does no harm.
"""

import faulthandler
import gc
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[2]
FORBIDDEN = frozenset(
    [
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.fork",
        "os.forkpty",
        "socket.connect",
        "socket.bind",
        "socket.getaddrinfo",
        "socket.sendto",
        "builtins.input",
        "pickle.find_class",
        "urllib.Request",
    ]
)
WRITING = frozenset(
    [
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.mkdir",
        "os.link",
        "os.symlink",
        "os.truncate",
        "os.chmod",
        "os.chown",
        "shutil.rmtree",
    ]
)
READABLE = (
    "/usr",
    "/lib",
    "/sys",
    "/proc/meminfo",
    "/proc/cpuinfo",
    f"/proc/{os.getpid()}/mount",
    "/dev/null",
    "/dev/urandom",
    os.path.expanduser("~/.cache/matplotlib"),
    *map(os.path.realpath, [sys.prefix, sys.base_prefix, ROOT, *sys.path]),
)
LONGEST_MESSAGE = 100_000
WARM: set[str] = set()  # readers that this process has used


class Guard:
    """The audit hook. `seen` holds what the case in `place` did and must not; None: nobody is
    watched.
    """

    def __init__(self, place: Path):
        self.place, self.seen = str(place.resolve()), None
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.seen is None:
            return
        watched, self.seen = self.seen, None  # what is done here is not watched
        try:
            if bad := self._judge(event, arguments):
                watched.append(bad)
                raise PermissionError(f"not while a file is read: {bad}")
        finally:
            self.seen = watched

    def _judge(self, event: str, arguments: tuple) -> str | None:
        if event in FORBIDDEN:
            return f"{event} {str(arguments)[:200]}"
        if event == "exec" and self._inside(getattr(arguments[0], "co_filename", "")):
            return f"code of the folder runs: {arguments[0].co_filename}"
        if event in WRITING:
            paths = [
                a
                for a in arguments[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]
                if isinstance(a, str | bytes | Path)
            ]
            return next((f"{event} {path}" for path in paths if not self._inside(path)), None)
        if event == "open" and isinstance(arguments[0], str | bytes | Path):
            return self._judge_open(*arguments)
        return None

    def _judge_open(self, path: Any, mode: str | None, flags: int) -> str | None:
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if writes:
            return (
                None
                if self._inside(path) or os.fsdecode(path) == os.devnull
                else f"writes {os.fsdecode(path)}"
            )
        real = os.path.realpath(os.fsdecode(path))
        secret = os.path.basename(real).startswith("secret.") and os.path.exists(real)
        return (
            None
            if (self._inside(path) or real.startswith(READABLE)) and not secret
            else f"reads {os.fsdecode(path)}"
        )

    def _inside(self, path: Any) -> bool:
        return os.path.realpath(os.fsdecode(path)).startswith(self.place + os.sep)


def main() -> None:
    place = Path(sys.argv[1])
    jobs, results = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what readers print is no result
    faulthandler.enable()
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(ROOT / "tests"))
    os.environ |= {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HOME": str(place / "hub"),
        "TQDM_DISABLE": "1",
        "TRANSFORMERS_VERBOSITY": "critical",
    }
    os.environ.pop("HF_HUB_OFFLINE", None)  # the hook sees who would go to the network
    from fuzz.probes import PROBES
    from fuzz.table import all_readers

    readers = all_readers() | PROBES

    def answer(value: dict[str, Any]) -> None:
        results.write(json.dumps(value) + "\n")
        results.flush()

    guard = Guard(place / "case")
    for line in jobs:
        job = json.loads(line)
        answer(
            {
                "case": _run(
                    guard,
                    readers[job["reader"]],
                    job["reader"],
                    job["seed"],
                    place,
                    lambda: answer({}),
                )
            }
        )


def _run(
    guard: Guard, reader: Any, name: str, seed: int, place: Path, started: Callable[[], None]
) -> dict[str, Any]:
    """One case: its folder is made, read, and judged."""
    valid, case = place / "valid" / name, place / "case"
    if name not in WARM:
        _warm_up(reader, valid)
        WARM.add(name)
        gc.collect()
        gc.freeze()  # what is there by now stays, and need not be looked through after every case
    from fuzz.mutations import REFUSED

    what = _prepare(name, seed, valid, case)
    (case / "what.txt").write_text(f"{name}, seed {seed}: {what}\n", errors="backslashreplace")
    tempfile.tempdir = str(case / "tmp")
    started()
    before, begun = _resident("VmRSS"), time.process_time()
    _forget_peak()
    guard.seen = []
    try:
        outcome, fault = _judged(reader, case / "in")
        if outcome == "refused" and seed == 0:
            outcome, fault = "fault", f"the valid folder is refused: {fault}"
        if outcome == "ok" and what in REFUSED:
            outcome, fault = "fault", f"accepted: {what}"
    finally:
        seen, guard.seen = guard.seen, None
        tempfile.tempdir = None
    seconds, grown = time.process_time() - begun, _resident("VmHWM") - before
    if seen:
        outcome, fault = "fault", f"{seen[0]}\n{fault or ''}"
    return {
        "outcome": outcome,
        "fault": fault,
        "what": what,
        "seconds": round(seconds, 3),
        "mib": grown // 1024,
    }


def _warm_up(reader: Any, valid: Path) -> None:
    """Make the valid folder where there is none, and read it: what reading imports and keeps is
    there when cases begin.
    """
    with tempfile.TemporaryDirectory(dir=valid.parent.parent) as temporary:
        made = Path(temporary, "in")
        if valid.exists():
            shutil.copytree(valid, made)
        else:
            made.mkdir()
            reader.make(made)
            shutil.copytree(made, valid)
        reader.read(made)


def _prepare(name: str, seed: int, valid: Path, case: Path) -> str:
    """The case's folder: `in` is damaged by the seed, 0 is as it was written, then comes the
    corpus. Returns what was done.
    """
    from fuzz.mutations import copy_folder, mutate_folder

    shutil.rmtree(case, ignore_errors=True)
    (case / "tmp").mkdir(parents=True)
    copy_folder(valid, case / "in")
    for secret in (case / "secret.png", case / "secret.safetensors"):
        shutil.copy(case.parent / secret.name, secret)
    if seed == 0:
        return "as it was written"
    from fuzz.corpus import corpus  # which takes a while: it draws pictures

    known = corpus(name)
    if seed <= len(known):
        known[seed - 1][1](case / "in")
        return known[seed - 1][0]
    return mutate_folder(case / "in", valid, Random(f"{name} {seed}"))


def _judged(reader: Any, folder: Path) -> tuple[str, str | None]:
    """("ok" | "refused" | "fault", traceback or what is wrong)."""
    from hipp_ext import errors

    allowed = tuple(getattr(errors, error) for error in reader.errors)
    try:
        reader.check(reader.read(folder), folder)
    except allowed as error:
        message = str(error)
        if len(message) > LONGEST_MESSAGE:
            return (
                "fault",
                f"a message of {len(message):,} characters\n{traceback.format_exc()[-3000:]}",
            )
        try:
            message.encode()
        except UnicodeEncodeError:
            return (
                "fault",
                "a message that cannot be printed: "
                f"{message!r}\n{traceback.format_exc().encode(errors='replace')}",
            )
        return "refused", message[:1000]
    except BaseException:  # SystemExit and KeyboardInterrupt are faults too
        return "fault", traceback.format_exc()[-8_000:]
    return "ok", None


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process [KiB]; 0 where there is no /proc."""
    try:
        return int(
            next(
                line
                for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith(field)
            ).split()[1]
        )
    except OSError:
        return 0


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


if __name__ == "__main__":
    main()
