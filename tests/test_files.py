"""Writes are complete or absent: links, mounts, other processes, full disks, kills."""

import os
import re
import resource  # noqa: F401 - for the children
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from hipp_ext.errors import OutputExistsError, WriteError
from hipp_ext.files import new_file, new_folder, require_new, require_new_file, write_atomic

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="changes owners")


def fill(folder: Path, text: str = "new") -> None:
    (folder / "config.json").write_text(text)
    (folder / "weights").mkdir()
    (folder / "weights/a").write_text(text)


def write(path: Path, text: str = "new", overwrite: bool = False) -> None:
    with new_folder(path, overwrite) as folder:
        fill(folder, text)


def content(path: Path) -> dict[str, str]:
    return {p.relative_to(path).as_posix(): p.read_text() for p in path.rglob("*") if p.is_file()}


def whole(text: str) -> dict[str, str]:
    return {"config.json": text, "weights/a": text}


def child(code: str, *arguments: object, before: str = "") -> subprocess.CompletedProcess:
    """Runs `code`, which can use `path` and `write`, in a child process.

    `before` is a shell command that runs first, in a private mount namespace.
    """
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_files import *\n"
        "path = Path(sys.argv[2])\n"
    )
    command = [
        sys.executable,
        "-c",
        program + textwrap.dedent(code),
        str(Path(__file__).parent),
        *map(str, arguments),
    ]
    if before:
        command = ["unshare", "-m", "sh", "-c", f'{before} && exec "$@"', "sh", *command]
    return subprocess.run(command, capture_output=True, text=True)


def mounts() -> bool:
    return (
        subprocess.run(
            ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
        ).returncode
        == 0
    )


needs_mounts = pytest.mark.skipif(
    not shutil.which("unshare") or not mounts(), reason="no mount namespace to be had"
)


# Links


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_is_written_through_a_link_and_the_link_stays(tmp_path, there):
    disk, link = tmp_path / "disk", tmp_path / "out"
    link.symlink_to(disk)
    if there:
        disk.mkdir()
    write(link)
    write(link, "again", overwrite=True)
    assert link.is_symlink() and content(disk) == whole("again")
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["disk", "out"]
        and len(list(disk.iterdir())) == 2
    )


def test_a_file_is_written_through_a_link_and_keeps_its_permissions(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(file)
    write_atomic(link, "a")
    assert (
        stat.S_IMODE(file.stat().st_mode) == 0o666 & ~(mask := os.umask(0)) and os.umask(mask) == 0
    )
    file.chmod(0o604)
    write_atomic(link, "b")
    assert (
        link.is_symlink() and file.read_text() == "b" and stat.S_IMODE(file.stat().st_mode) == 0o604
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    refused = {
        "circle": "leads to itself",
        "file/out": "Not a directory",
        "file/deep/out": "Not a directory",
        "x" * 300: "name too long",
        "nul\0": "null byte",
    }
    for name, message in refused.items():
        for attempt in (require_new, lambda p: write_atomic(p, "x"), write):
            with pytest.raises(WriteError, match=message):
                attempt(tmp_path / name)
    for name, message in {"pipe": "a device or a pipe", "folder": "is a folder; a file"}.items():
        with pytest.raises(WriteError, match=message):
            write_atomic(tmp_path / name, "x")
        with pytest.raises(WriteError, match=message):
            require_new_file(tmp_path / name, overwrite=True)


def test_long_names_have_room_for_a_temporary_one(tmp_path):
    write_atomic(tmp_path / ("f" * 255), "x")
    write(tmp_path / ("d" * 255))
    assert len(list(tmp_path.iterdir())) == 2


# Places of others


@AS_ROOT
@pytest.mark.parametrize("sticky", [False, True])
def test_a_folder_in_a_parent_of_somebody_else(tmp_path, sticky):
    shared = tmp_path / "shared"
    (shared / "mine").mkdir(parents=True)
    os.chown(shared / "mine", 65534, 65534)
    (shared / "file").write_text("old")
    os.chmod(shared / "file", 0o666)
    shared.chmod(0o1777 if sticky else 0o755)
    for folder in (tmp_path, *tmp_path.parents):
        if folder != Path(tempfile.gettempdir()) and folder.is_relative_to(tempfile.gettempdir()):
            folder.chmod(0o755)
    inode = (shared / "mine").stat().st_ino
    os.seteuid(65534)
    try:
        write(shared / "mine")
        write_atomic(shared / "file", "new")
        with pytest.raises(WriteError, match="does not let you|may not write"):
            require_new(tmp_path / "other")
        with pytest.raises(WriteError, match="may not write to"):
            require_new(tmp_path, overwrite=True)
    finally:
        os.seteuid(0)
    assert content(shared / "mine") == whole("new") and (shared / "file").read_text() == "new"
    assert len(list(shared.iterdir())) == 2 and (sticky or (shared / "mine").stat().st_ino == inode)


def test_a_folder_that_is_there_keeps_its_permissions(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o2750)
    write(tmp_path / "out")
    write(tmp_path / "out", overwrite=True)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o2750


@needs_mounts
@pytest.mark.parametrize(
    "how", ["-t tmpfs none", "--bind {0}/disk"]
)  # also one that os.path.ismount does not see
def test_a_mounted_volume_is_written_into(tmp_path, how):
    for name in ("out", "disk"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("old")
    code = """
        (path / "out/lost+found").mkdir()
        write(path / "out"); write(path / "out", "again", overwrite=True)
        write_atomic(path / "file", "new")
        print(content(path / "out") == whole("again"), (path / "file").read_text())
        print(sorted(os.listdir(path)), len(os.listdir(path / "out")))
    """
    file = f"{tmp_path}/file"
    mounted = f"mount {how.format(tmp_path)} {tmp_path}/out && mount --bind {file} {file}"
    done = child(code, tmp_path, before=mounted)
    assert done.stdout.strip() == "True new\n['disk', 'file', 'out'] 3", done.stderr


# Other jobs


@pytest.mark.parametrize("inside", [False, True])
def test_what_another_job_wrote_meanwhile_stays_and_so_does_the_finished_work(tmp_path, inside):
    out = tmp_path / "out"
    if inside:
        (tmp_path / "disk").mkdir()
        out.symlink_to(tmp_path / "disk")
    meanwhile = pytest.raises(OutputExistsError, match="written by another process in the meantime")
    with meanwhile as refusal, new_folder(out) as folder:
        fill(folder)
        out.mkdir(exist_ok=True)
        (out / "theirs").write_text("hours of work")
    kept = Path(re.search(r"finished result is (.*)\.$", str(refusal.value))[1])
    assert (out / "theirs").read_text() == "hours of work" and content(kept) == whole("new")
    assert not [p for p in tmp_path.rglob("*") if ".hipp-" in p.name]


def test_overwriting_replaces_also_what_came_meanwhile(tmp_path):
    out = tmp_path / "out"
    with new_folder(out, overwrite=True) as folder:
        fill(folder)
        write(out, "theirs")
    assert content(out) == whole("new") and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_error_names_the_option(tmp_path):
    write(tmp_path / "out")
    with pytest.raises(OutputExistsError, match="--overwrite, in Python overwrite=True"):
        require_new(tmp_path / "out")


# Killed


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_anywhere_the_next_run_ends_as_if_nothing_had_been(tmp_path, inside, overwrite):
    """Killed before every change of the disk (every third without overwriting)."""
    for step in range(0, 100, 1 if overwrite else 3):
        place = tmp_path / str(step)
        place.mkdir()
        out = place / "out"
        if inside:
            (place / "disk").mkdir()
            out.symlink_to(place / "disk")
        if overwrite:
            write(out, "old")
        pid = os.fork()
        if not pid:
            killed_at(step, lambda: write(out, "new", overwrite))  # noqa: B023
        if os.WEXITSTATUS(status := os.waitpid(pid, 0)[1]) == 0 and not os.WIFSIGNALED(status):
            assert step > 5, "nothing was counted"
            assert content(out) == whole("new")
            break
        seen = content(out) if (out / "config.json").exists() else None
        assert seen is None or {k: v for k, v in seen.items() if not k.startswith(".")} in (
            whole("old"),
            whole("new"),
        )
        require_new(out, overwrite=True)
        kept = content(out) if out.exists() else {}
        assert kept in ([whole("old"), whole("new")] if overwrite else [{}, whole("new")])
        write(out, "after", overwrite=True)
        assert content(out) == whole("after")
        assert not [p for p in place.rglob("*") if ".hipp-" in p.name], step
        shutil.rmtree(place)
    else:
        pytest.fail("no run got through")


def killed_at(step: int, action) -> None:
    """In a forked process: run `action`, and die before the change of the disk with this number."""
    left = [step]

    def counted(real):
        def change(*arguments, **named):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(*arguments, **named)

        return change

    for name in ("rename", "replace", "mkdir", "rmdir", "unlink", "chmod", "open"):
        setattr(os, name, counted(getattr(os, name)))
    try:
        action()
    except BaseException:
        os._exit(1)
    os._exit(0)


def test_a_killed_file_leaves_nothing_to_the_next(tmp_path):
    code = """
        with new_file(path / "file") as file:
            file.write(b"half"); file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert child(code, tmp_path).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    write_atomic(tmp_path / "file", "whole")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (
        tmp_path / "file"
    ).read_text() == "whole"


def test_what_a_living_job_is_writing_is_left_alone(tmp_path):
    with (
        new_folder(tmp_path / "out", overwrite=True) as folder,
        new_file(tmp_path / "file") as file,
    ):
        fill(folder, "slow")
        file.write(b"slow")
        done = child(
            "write(path / 'out', 'quick', overwrite=True); write_atomic(path / 'file', 'quick')",
            tmp_path,
        )
        assert done.returncode == 0 and content(tmp_path / "out") == whole("quick")
        assert (tmp_path / "file").read_text() == "quick"
    assert content(tmp_path / "out") == whole("slow") and (tmp_path / "file").read_text() == "slow"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]


def test_other_errors_pass_and_leave_nothing(tmp_path):
    for attempt in (new_file, new_folder):
        with pytest.raises(FileNotFoundError, match="picture.png"), attempt(tmp_path / "out"):
            (tmp_path / "picture.png").read_bytes()
        assert list(tmp_path.iterdir()) == []


# Full disks

WRITERS = {
    "bytes": "(folder / 'a').write_bytes(bytes(3_000_000))",
    "inner": "write_atomic(folder / 'a', bytes(3_000_000))",
    "safetensors": "import numpy as n, safetensors.numpy as s; "
    "s.save_file({'a': n.zeros(3_000_000)}, folder / 'a')",
}


@pytest.mark.parametrize("disk", ["small", pytest.param("tmpfs", marks=needs_mounts)])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_named_and_nothing_is_left(tmp_path, writer, disk):
    (tmp_path / "disk").mkdir()
    code = f"""
        if {disk == "small"}: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        write(path / "out", "old")
        try:
            with new_folder(path / "out", overwrite=True) as folder:
                {WRITERS[writer]}
        except WriteError as error: print(error)
        print(content(path / "out") == whole("old"), os.listdir(path))
    """
    before = f"mount -t tmpfs -o size=1m none {tmp_path}/disk" if disk == "tmpfs" else ""
    done = child(code, tmp_path / "disk", before=before)
    reason = "No space left on device" if disk == "tmpfs" else "File too large"
    assert done.stdout == (
        f"{tmp_path}/disk/out could not be written: {reason}. Free some space there, or choose "
        "another place, and run it again.\nTrue ['out']\n"
    ), done.stderr


@needs_mounts
def test_a_disk_that_is_read_only_is_refused_before_the_work(tmp_path):
    code = """
        for attempt in (require_new, write, lambda p: write_atomic(p, "x")):
            try: attempt(path / "out")
            except WriteError as error: print(error)
    """
    done = child(code, tmp_path, before=f"mount -t tmpfs -o ro none {tmp_path}")
    assert len(done.stdout.splitlines()) == 3, done.stderr
