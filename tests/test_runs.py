"""A run's folder goes on for the same run and refuses another one; only one process works in it."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from hipp_ext.errors import CheckpointError, OutputBusyError, WriteError
from hipp_ext.runs import RunFolder

IDENTITY = {"settings": {"steps": 7, "sizes": (2, 3)}, "dense": [0.5], "seed": None}


def test_the_same_identity_goes_on_and_a_name_is_a_path_in_the_folder(tmp_path):
    with RunFolder(tmp_path / "a/run", IDENTITY) as run:
        (run / "part").write_text("half")
    with RunFolder(tmp_path / "a/run", IDENTITY) as run:
        assert (run / "part").read_text() == "half" and run.path == tmp_path / "a/run"
    written = json.loads((tmp_path / "a/run/run.json").read_text())
    assert written["format"] == 1 and written["identity"]["settings"]["sizes"] == [2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"steps": 8, "sizes": (2, 3)}}, "settings.steps is 7 there, and 8 was asked"),
        ({"settings": {"steps": 7, "sizes": (2,)}}, r"settings.sizes is \[2, 3\] there, and \[2\]"),
        ({"seed": 0}, "seed is None there, and 0 was asked for. Repeat the command that began"),
        ({"more": 1}, r"more is \(nothing\) there, and 1 was asked for.*remove this one"),
        ({"settings": 7}, r"settings is \{'steps': 7, .*\} there, and 7 was asked for"),
    ],
)
def test_another_identity_is_refused_and_the_difference_named(tmp_path, change, message):
    RunFolder(tmp_path, IDENTITY).close()
    for owner in (True, False):
        with pytest.raises(CheckpointError, match=f"holds another run: {message}"):
            RunFolder(tmp_path, IDENTITY | change, owner=owner)
    RunFolder(tmp_path, IDENTITY).close()  # a refusal leaves no lock


def test_another_identity_replaces_one_of_a_run_that_has_not_begun(tmp_path):
    def begun(folder):
        return (folder / "part").exists()

    RunFolder(tmp_path, IDENTITY, begun=begun).close()
    other = IDENTITY | {"seed": 1}
    RunFolder(tmp_path, other, begun=begun, owner=False)  # compares nothing, writes nothing
    assert json.loads((tmp_path / "run.json").read_text())["identity"]["seed"] is None
    with RunFolder(tmp_path, other, begun=begun) as run:
        assert json.loads((run / "run.json").read_text())["identity"]["seed"] == 1
        (run / "part").touch()
    for owner in (True, False):
        with pytest.raises(CheckpointError, match="holds another run: seed is 1 there, and None"):
            RunFolder(tmp_path, IDENTITY, begun=begun, owner=owner)


def test_values_may_differ_a_little_where_a_comparison_says_so(tmp_path):
    def near(there, now):
        return abs(there[0] - now[0]) < 0.1

    RunFolder(tmp_path, IDENTITY).close()
    RunFolder(tmp_path, IDENTITY | {"dense": [0.51]}, same={"dense": near}).close()
    for dense in ([0.7], [], None):
        with pytest.raises(CheckpointError, match=r"dense is \[0.5\] there"):
            RunFolder(tmp_path, IDENTITY | {"dense": dense}, same={"dense": near})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "is damaged"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"format": 2, "identity": {}}', "has format 2, not 1"),
        (b'{"format": 1}', "is damaged: 'identity'"),
        (None, "is a pipe"),
    ],
)
def test_a_damaged_identity_says_what_to_do(tmp_path, content, message):
    if content is None:
        os.mkfifo(tmp_path / "run.json")
    else:
        (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"is damaged: .*{message}|{message}") as refusal:
        RunFolder(tmp_path, IDENTITY)
    assert "Remove it to start again" in str(refusal.value)


def test_two_runs_never_work_in_one_folder(tmp_path):
    with RunFolder(tmp_path, IDENTITY):
        with pytest.raises(OutputBusyError, match="Another process works in .*Wait for it"):
            RunFolder(tmp_path, IDENTITY)
        RunFolder(tmp_path, IDENTITY, owner=False)  # a process of the same run
    first = RunFolder(tmp_path, IDENTITY)
    del first  # the lock goes with the object
    RunFolder(tmp_path, IDENTITY).close()


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = """
        import os, signal, sys
        from hipp_ext.runs import RunFolder
        run = RunFolder(sys.argv[1], {"seed": 1})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "run")]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["run.json"]
    RunFolder(tmp_path / "run", {"seed": 1}).close()


def test_a_process_that_does_not_own_the_run_writes_nothing(tmp_path):
    RunFolder(tmp_path / "run", IDENTITY, owner=False)
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        with pytest.raises(WriteError, match="could not be written: .*another place"):
            RunFolder(tmp_path / place, IDENTITY)
