"""Cases one after the other in a worker that is watched from here: it may crash, hang, or fill the
memory.
"""

import hashlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SECONDS, MIB = 10.0, 2048
_FRAME = re.compile(
    rf'File "{re.escape(str(ROOT))}/((?:hipp_ext|evals|integrations)/[^"]+\.py)", line (\d+)'
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What came of one case.

    Attributes:
        reader, seed: which case; the same two make it again.
        what: the damage.
        outcome: "ok" (a valid result), "refused" (an error of hipp_ext/errors.py) or "fault".
        fault: traceback or what is wrong; the message where it was refused.
        seconds, mib: how long it took, and by how much the peak of memory rose.
    """

    reader: str
    seed: int
    what: str
    outcome: str
    fault: str | None
    seconds: float
    mib: int

    @property
    def signature(self) -> str:
        """Where in the product the fault lies, and its kind: faults of one signature are one
        fault.
        """
        text = self.fault or ""
        frames = _FRAME.findall(text)
        crashed = text.startswith("killed")  # a crash's frames come with the innermost first
        place = ":".join(frames[0 if crashed else -1]) if frames else "?"
        kind = text.split("\n", 1)[0] if not text.startswith("Traceback") else _last_line(text)
        return f"{place} {re.sub(r'0x[0-9a-f]+|[0-9]+', 'N', kind)[:90]}"

    def __str__(self) -> str:
        again = (
            f"PYTHONPATH=tests python -m fuzz --reader {self.reader} --seed {self.seed} --cases 1"
        )
        return f"{self.reader}, seed {self.seed}: {self.what}\n{self.fault}\nAgain: {again}"


def _not_kept(folder: str, names: list[str]) -> list[str]:
    """Pipes, which cannot be copied, and what is the same for all cases."""
    return [n for n in names if n == "tmp" or n.startswith("secret.") or Path(folder, n).is_fifo()]


def _last_line(text: str) -> str:
    return next(line for line in reversed(text.split("\n")) if line and not line.startswith(" "))


class Worker:
    """A worker process in the folder `place`, started when it is needed and again when it has
    died.
    """

    def __init__(self, place: Path, seconds: float = SECONDS, mib: int = MIB):
        self.place, self.seconds, self.mib = place, seconds, mib
        self.process: subprocess.Popen | None = None
        self.kept: set[str] = set()
        for folder in ("valid", "case"):
            (place / folder).mkdir(parents=True, exist_ok=True)
        for secret in ("secret.png", "secret.safetensors"):
            (place / secret).write_bytes(
                (ROOT / "evals/studies/results/robust.png").read_bytes() + b"SECRET"
            )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, reader: str, seed: int) -> Case:
        """One case. The folder of a fault that was not seen before is kept in
        `place`/faults/READER-SEED.
        """
        result = self._ask({"reader": reader, "seed": seed})
        case = Case(reader=reader, seed=seed, **result)
        if case.outcome != "fault" and case.mib > self.mib:
            case = Case(
                **asdict(case)
                | {"outcome": "fault", "fault": f"killed: {case.mib} MiB for one file"}
            )
        if case.outcome == "fault" and case.signature not in self.kept:
            self.kept.add(case.signature)
            place = self.place / "faults" / f"{reader}-{seed}"
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(self.place / "case", place, ignore=_not_kept, symlinks=True)
            (place / "fault.txt").write_text(f"{case}\n", errors="backslashreplace")
        return case

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        process = self.process = self.process or self._start()
        assert process.stdin and process.stdout
        told, what = (self.place / "worker.log").stat().st_size, self.place / "case/what.txt"
        what.unlink(missing_ok=True)
        process.stdin.write(json.dumps(job).encode() + b"\n")
        # First a valid folder is made, if there is none yet; then the case begins.
        why = self._wait(process, self.seconds * 12) or (
            process.stdout.readline() and self._wait(process, self.seconds)
        )
        if line := b"" if why else process.stdout.readline():
            return json.loads(line)["case"]
        if why:
            process.send_signal(signal.SIGABRT)  # faulthandler then says where it was
        code = process.wait()
        self.process = None
        said = (
            (self.place / "worker.log")
            .read_bytes()[told:]
            .decode(errors="replace")
            .partition("\nExtension modules")[0]
        )
        why = why or (signal.Signals(-code).name if code < 0 else f"exit {code}")
        damage = (
            what.read_text(errors="replace").partition(": ")[2].strip()
            if what.exists()
            else "while the valid folder was made"
        )
        return {
            "outcome": "fault",
            "fault": f"killed: {why}\n{said[-8000:]}",
            "what": damage,
            "seconds": 0.0,
            "mib": 0,
        }

    def _wait(self, process: subprocess.Popen, seconds: float) -> str:
        """Wait for the worker to say something, or to end; what is wrong where it takes too much,
        else nothing.

        Seconds are of the processor, for others may work on this machine; or of the clock, where
        the worker only waits.
        """
        begun, (base, spent) = time.monotonic(), _usage(process.pid)
        while not select.select([process.stdout], [], [], 0.05)[0]:
            now, cpu = _usage(process.pid)
            passed, worked = time.monotonic() - begun, cpu - spent
            if now - base > self.mib:
                return f"more than {self.mib} MiB for one file"
            if worked > seconds or (passed > seconds and worked < 0.03 * passed):
                return (
                    f"it takes longer than {seconds:g} s"
                    if worked > seconds
                    else f"it waits for longer than {seconds:g} s"
                )
        return ""

    def _start(self) -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
        with (self.place / "worker.log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "fuzz.worker", str(self.place)],
                cwd=ROOT / "tests",
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
            )

    def _stop(self) -> None:
        if self.process and self.process.stdin:
            self.process.stdin.close()
            self.process.wait()
        self.process = None


def _usage(pid: int) -> tuple[int, float]:
    """(memory in MiB, processor time in s) of a process at this moment; zeros where there is no
    /proc.
    """
    try:
        pages, ticks = (
            Path(f"/proc/{pid}/statm").read_text().split()[1],
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split(),
        )
    except (OSError, IndexError):
        return 0, 0.0
    return int(pages) * os.sysconf("SC_PAGE_SIZE") >> 20, (
        int(ticks[11]) + int(ticks[12])
    ) / os.sysconf("SC_CLK_TCK")


def code_digest() -> str:
    """Digest of the product's and the fuzzer's code: with other code, cases are made and counted
    anew.
    """
    digest = hashlib.sha256()
    for folder in ("hipp_ext", "evals", "integrations", "tests/fuzz"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def cases(worker: Worker, reader: str, seeds: range) -> Iterator[Case]:
    """The cases of some seeds."""
    for seed in seeds:
        yield worker.run(reader, seed)
