"""The log of answers: killed at any point, written by several processes, on file systems without
locks, and damaged.
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hipp_ext.errors import DataError, OutputBusyError, WriteError
from hipp_ext.evals.prediction_log import LOCK, PredictionLog, claim, open_log
from hipp_ext.evals.predictions import answer_rows
from hipp_ext.files import temporaries

ORDER = [f"q{n}" for n in range(13)]


class Model:
    """Says in every answer with which questions it was asked together."""

    def __init__(self, seconds: float = 0):
        self.asked, self.seconds = [], seconds

    def generate_batch(self, messages: list) -> list[str]:
        time.sleep(self.seconds)
        self.asked.append(len(messages))
        return [f"{row} of {messages}" for row in messages]


def answer(
    path: Path, batch_size: int = 4, limit: int | None = None, seconds: float = 0
) -> list[int]:
    """The sizes of the batches that had to be asked."""
    model = Model(seconds)
    with open_log(path, ORDER) as log:
        answer_rows(
            lambda: model,
            log,
            ORDER,
            lambda row: [row],
            batch_size=batch_size,
            progress=None,
            limit=limit,
        )
    return model.asked


@pytest.fixture
def whole(tmp_path) -> bytes:
    """What a run leaves that nothing disturbs."""
    assert answer(tmp_path / "whole/log.jsonl") == [4, 4, 4, 1]
    assert [file.name for file in (tmp_path / "whole").iterdir()] == ["log.jsonl"]
    return (tmp_path / "whole/log.jsonl").read_bytes()


# ------------------------------------------------------------------------------------- the same
# answers, whatever happens


def test_a_file_cut_off_anywhere_is_completed_to_the_same_bytes(tmp_path, whole):
    for cut in range(0, len(whole) + 1, 7):
        file = tmp_path / "log.jsonl"
        file.write_bytes(whole[:cut])
        lines = whole[:cut].count(b"\n")
        assert sum(answer(file)) == (13 - lines // 4 * 4 if lines < 13 else 0)
        assert file.read_bytes() == whole, cut


def test_limits_ask_whole_batches(tmp_path, whole):
    file = tmp_path / "log.jsonl"
    assert [answer(file, limit=n) for n in (1, 4, 5, 13)] == [[4], [], [4], [4, 1]]
    assert file.read_bytes() == whole


def test_another_batch_size_keeps_what_is_there(tmp_path, whole):
    file = tmp_path / "log.jsonl"
    assert answer(file, batch_size=3, limit=5) == [3, 3]
    assert answer(file, batch_size=5) == [5, 2] and answer(file) == []
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    assert [entry["index"] for entry in entries] == ORDER
    assert [entry["batch"] for entry in entries] == [3] * 6 + [5] * 5 + [2] * 2


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from test_prediction_log import answer, temporaries
from hipp_ext.errors import OutputBusyError
if {no_locks}:
    temporaries.fcntl = None
print("ready", flush=True)
try:
    answer(Path({file!r}), seconds={seconds})
except OutputBusyError as error:
    sys.exit(2)
"""


def start(file: Path, seconds: float, no_locks: bool = False) -> subprocess.Popen:
    code = SCRIPT.format(
        here=str(Path(__file__).parent), file=str(file), seconds=seconds, no_locks=no_locks
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize("no_locks", [False, True])
def test_killed_at_random_times(tmp_path, whole, no_locks, monkeypatch):
    if no_locks:
        monkeypatch.setattr(temporaries, "fcntl", None)
    for seed in range(3):
        file = tmp_path / f"{seed}/log.jsonl"
        process = start(file, 0.05, no_locks)
        time.sleep(random.Random(seed).uniform(0, 0.25))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        answer(file)
        assert file.read_bytes() == whole
        left = {path.name for path in file.parent.iterdir()} - {file.name}
        # Without locks nobody can tell a leftover of the killed process from another one's file.
        assert not left or (no_locks and all(name.startswith(f".{file.name}.") for name in left))


def test_two_processes_at_once(tmp_path, whole):
    """One of them works, the other is refused at once, and may come back."""
    file = tmp_path / "run/log.jsonl"
    first = start(file, 0.2)
    while not (file.parent / LOCK).exists() or not (file.parent / LOCK).read_text():
        time.sleep(0.01)
    with pytest.raises(
        OutputBusyError,
        match=rf"run is being written by process {first.pid} on .*\. Wait until it has ended",
    ):
        answer(file)
    assert first.wait() == 0
    assert answer(file) == [] and file.read_bytes() == whole
    assert [left.name for left in file.parent.iterdir()] == [file.name]


def test_two_processes_where_there_are_no_locks(tmp_path, whole):
    file = tmp_path / "run/log.jsonl"
    both = [start(file, 0.1, no_locks=True) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert file.read_bytes() == whole and [left.name for left in file.parent.iterdir()] == [
        file.name
    ]


def test_file_systems_that_refuse_locks(tmp_path, whole, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(temporaries.fcntl, "flock", refuse)
    file = tmp_path / "log.jsonl"
    with open_log(file, ORDER) as one, open_log(file, ORDER) as other:
        for log, rows in ((one, (0, 1, 2, 3)), (other, (4, 5, 6, 7))):
            log.add(
                (ORDER[row], f"{row} of {[[r] for r in rows]}".replace(f"{row} of", f"{[row]} of"))
                for row in rows
            )
        assert not file.exists()
    assert answer(file) == [4, 1] and file.read_bytes() == whole
    assert [left.name for left in tmp_path.iterdir() if left.is_file()] == [file.name]


def test_a_claim_is_of_one_folder_and_ends(tmp_path):
    with claim(tmp_path / "a") as alone, claim(tmp_path / "b"):
        assert alone
        with pytest.raises(OutputBusyError), claim(tmp_path / "a"):
            pass
    with claim(tmp_path / "a") as alone:
        assert alone
    assert not list(tmp_path.glob("*/*"))


# --------------------------------------------------------------------------------------------------
# --------- refusals


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"index": "1"}',
        b'{"index": true, "prediction": "Yes"}',
        b'{"index": "1", "prediction": NaN}',
        b'{"index": "1", "prediction": ["Yes"]}',
        b'{"index": "1", "prediction": "\xff"}',
        b'{"index": "1", "prediction": "\\ud800"}',
        b'{"index": "1", "prediction": "Yes", "batch": 1e999}',
        b"null",
        b"",
        b"\0" * 40,
    ],
)
def test_damaged_lines_are_not_guessed_at(tmp_path, line):
    file = tmp_path / "log.jsonl"
    file.write_bytes(
        b'{"index": "0", "prediction": "No"}\n' + line + b'\n{"index": "2", "prediction": "Yes"}\n'
    )
    with pytest.raises(DataError, match="line 2, is damaged: .* Delete the file to start over"):
        PredictionLog(file)


@pytest.mark.parametrize(("batches", "left"), [([2, 2, 3, 3], 2), ([10**30], 0), ([1, 4], 1)])
def test_a_batch_that_is_not_all_there_is_none(tmp_path, batches, left):
    write(tmp_path / "log.jsonl", batches)
    assert len(PredictionLog(tmp_path / "log.jsonl").answers) == left


@pytest.mark.parametrize(
    ("batches", "line"), [([0], 1), ([2, 2, -1], 3), ([3, 3, 2], 1), ([1, 3, 3, 5, 5], 2)]
)
def test_batches_that_do_not_fit_together(tmp_path, batches, line):
    write(tmp_path / "log.jsonl", batches)
    with pytest.raises(
        DataError,
        match=rf"line {line}, is damaged: it does not belong to a batch of .*Delete the file",
    ):
        PredictionLog(tmp_path / "log.jsonl")


def write(file: Path, batches: list[int]) -> None:
    lines = [
        {"index": index, "prediction": "Yes", "batch": size}
        for index, size in zip(ORDER, batches, strict=False)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file.* cannot be written: "):
        answer(tmp_path / "file/log.jsonl")
    with pytest.raises(WriteError, match="cannot be written"):
        PredictionLog("/proc/nowhere/log.jsonl")
