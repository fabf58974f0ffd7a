"""Annotations, published questions and ScienceQA's files from strangers; and one output that
several processes write.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hipp_ext.errors import DataError, WriteError
from hipp_ext.evals.data.coco import read_captions, read_instances
from hipp_ext.evals.data.pope import build_pope, pope_from_published
from hipp_ext.evals.data.scienceqa import write_scienceqa
from hipp_ext.evals.data.writing import file_pictures, write_table

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(autouse=True)
def bearable():
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 10


def instances(folder: Path, **changes: object) -> Path:
    known = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 1, "category_id": 1}],
        "categories": [{"id": 1, "name": "cup"}],
    } | changes
    (folder / "instances.json").write_text(json.dumps(known))
    return folder / "instances.json"


# --------------------------------------------------------------------------------------------------
# - JSON


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"annotations": [{"image_id": [1], "category_id": 1}]},
            "not a COCO instance file: .*\\[1\\] is not an id",
        ),
        ({"annotations": [{"image_id": 1, "category_id": {}}]}, "\\{\\} is not an id"),
        ({"annotations": [{"image_id": True, "category_id": 1}]}, "True is not an id"),
        ({"annotations": [{"image_id": float("inf"), "category_id": 1}]}, "inf is not an id"),
        (
            {"annotations": [{"image_id": 10**400, "category_id": 1}]},
            "refer to an unknown image, the first to image 1000",
        ),
        ({"images": [{"id": [], "file_name": "a"}]}, "\\[\\] is not an id"),
        (
            {"images": [{"id": 1, "file_name": ["a.jpg", "b.jpg"]}]},
            "image 1 has 2 pictures in a list",
        ),
        ({"images": [{"id": 1, "file_name": {"a": 1}}]}, "is not a text"),
        ({"categories": [{"id": 1, "name": ["cup"]}]}, "is not a text"),
        ({"categories": [[]]}, "not a COCO instance file"),
        ({"images": "abc"}, "not a COCO instance file"),
    ],
)
def test_instances_of_odd_types_are_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        read_instances(instances(tmp_path, **changes))


def test_a_list_of_one_file_name_is_that_file(tmp_path):
    images, _ = read_instances(instances(tmp_path, images=[{"id": 1, "file_name": ["a.jpg"]}]))
    assert images[0].file_name == "a.jpg"


@pytest.mark.parametrize(
    "text", [DEEP, '{"annotations": ' + DEEP + "}", "\ud800", "", "1" * 5000, "{"]
)
def test_json_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    for read in (read_instances, read_captions):
        with pytest.raises(DataError, match="x.json is not valid JSON"):
            read(tmp_path / "x.json")


def test_json_that_is_no_plain_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DataError, match="pipe.json is a pipe or a device"):
        read_instances(tmp_path / "pipe.json")
    with pytest.raises(DataError, match="/dev/zero is a pipe or a device"):
        read_captions("/dev/zero")


def test_so_many_objects_are_not_paired(tmp_path):
    many = 20_000
    file = instances(
        tmp_path,
        categories=[{"id": n, "name": f"n{n}"} for n in range(many)],
        annotations=[{"image_id": 1, "category_id": n} for n in range(many)],
    )
    with pytest.raises(
        DataError, match="hold 400,000,000 pairs of objects, and 10,000,000 are counted at most"
    ):
        build_pope(read_instances(file)[0], n_images=1)


# --------------------------------------------------------------------------------------------------
# - POPE's own files


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"image": ["a.jpg", "b.jpg"], "text": "t", "label": "yes"}',
            "line 1 has 2 pictures in a list",
        ),
        (
            '{"image": "[\'a.jpg\', \'b.jpg\']", "text": "t", "label": "yes"}',
            "line 1 has 2 pictures in a list",
        ),
        (
            '{"image": [7], "text": "t", "label": "yes"}',
            "line 1 is not a POPE question .*must be texts",
        ),
        ('{"image": "a.jpg", "text": ["t"], "label": "yes"}', "must be texts"),
        ('{"image": "a.jpg", "text": "t", "label": ["yes"]}', "the label is \\['yes'\\]"),
        ('{"image": "a.jpg", "text": "t"}', "is not a POPE question"),
        ("7", "is not a POPE question"),
        (DEEP, "line 1 is not valid JSON"),
        ("\xff", "line 1 is not valid JSON"),
    ],
)
def test_published_lines_are_checked(tmp_path, line, message):
    for split in ("random", "popular", "adversarial"):
        (tmp_path / f"coco_pope_{split}.json").write_bytes(line.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=message):
        pope_from_published(tmp_path)


def test_a_published_list_of_one_picture_is_that_picture(tmp_path):
    for split in ("random", "popular", "adversarial"):
        (tmp_path / f"coco_pope_{split}.json").write_text(
            '{"image": ["a.jpg"], "text": "a\u2028b", "label": "yes"}\n'
        )
    assert [(q.image, q.text) for q in pope_from_published(tmp_path)[0]] == [("a.jpg", "a\u2028b")]


# --------------------------------------------------------------------------------------------------
# - pictures


def test_pictures_of_a_folder_are_plain_files_in_it(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    for name, message in (
        ("pipe.png", "pipe.png cannot be read: It is a pipe or a device"),
        ("zero.png", "leads out of the"),
        ("a\0b", "leads out of the"),
        ("x" * 5000, "1 of 1 images are missing"),
        ("/etc/hostname", "leads out of"),
    ):
        with pytest.raises(DataError, match=message):
            file_pictures(folder, [name])


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_texts_that_no_tsv_can_hold_are_refused(tmp_path, text):
    Image.new("RGB", (3, 3)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="row 0, .* holds a null byte or half a character"):
        write_table(
            tmp_path / "x.tsv",
            [{"index": 0, "q": text}],
            file_pictures(tmp_path, ["a.png"]),
            source={},
        )
    assert not (tmp_path / "x.tsv").exists()


def test_eps_is_no_picture_here(tmp_path):
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    )
    with pytest.raises(
        DataError,
        match="the image a.png is broken, it cannot be decoded: it is no picture of a kind",
    ):
        write_table(
            tmp_path / "x.tsv", [{"index": 0}], file_pictures(tmp_path, ["a.png"]), source={}
        )


# --------------------------------------------------------------------------------------------------
# - ScienceQA


def problem(**changes: object) -> dict[str, object]:
    return {
        "question": "q",
        "choices": ["a", "b"],
        "answer": 0,
        "hint": "",
        "topic": "t",
        "subject": "s",
        "image": "image.png",
        "split": "test",
    } | changes


@pytest.mark.parametrize(
    ("pids", "changes", "message"),
    [
        (["7"], {"image": ["a.png", "b.png"]}, "problem 7 has 2 pictures in a list"),
        (["7"], {"image": {"a": 1}}, "problem 7: the image and the split must be texts"),
        (["7"], {"split": [1]}, "problem 7: the image and the split must be texts"),
        (["7"], {"answer": True}, "the answer is True"),
        (["7"], {"answer": 10**400}, "the answer is 1000"),
        (["7"], {"hint": ["x"]}, "the hint must be a text"),
        (["7"], {"question": "a\0b"}, "holds a null byte"),
        ([["7"]], {}, "lists problem \\['7'\\], which"),
        (["9" * 5000], {}, "which problems.json does not have"),
        ([float("inf")], {}, "lists problem inf"),
    ],
)
def test_problems_of_odd_types_are_refused(tmp_path, pids, changes, message):
    (tmp_path / "images/test/7").mkdir(parents=True)
    Image.new("RGB", (3, 3)).save(tmp_path / "images/test/7/image.png")
    (tmp_path / "problems.json").write_text(
        json.dumps({"7": problem(**changes), "9" * 5000: problem()})
    )
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": pids}))
    with pytest.raises(DataError, match=message):
        write_scienceqa(tmp_path, tmp_path / "lmu", ["test"])
    assert not list(tmp_path.glob("lmu/*"))


def parquet(
    file: Path, picture: bytes, rows: int, image: object = None, **options: object
) -> bytes:
    cells = pa.array([image or {"bytes": picture, "path": None}] * rows)
    texts = {name: ["x"] * rows for name in ("question", "hint", "topic", "subject")}
    table = pa.table(
        {"image": cells, **texts, "choices": [["a", "b"]] * rows, "answer": [0] * rows}
    )
    pq.write_table(table, file, **options)
    return file.read_bytes()


def png() -> bytes:
    import io

    buffer = io.BytesIO()
    Image.new("RGB", (60, 60), "red").save(buffer, "PNG")
    return buffer.getvalue()


def test_a_parquet_file_that_is_cut_or_bent_is_refused_or_read(tmp_path):
    file = tmp_path / "test.parquet"
    whole = parquet(file, png(), 5, compression="none")
    assert len(write_scienceqa(tmp_path, tmp_path / "lmu", ["test"])) == 1
    for number in range(60):
        at = (number * 7919) % len(whole)
        cut = whole[: at // 2] + whole[at // 2 + 40 :]
        file.write_bytes(
            whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :] if number % 2 else cut
        )
        try:
            write_scienceqa(tmp_path, tmp_path / "lmu", ["test"], overwrite=True)
        except DataError as error:
            assert str(error)  # noqa: PT017


def test_a_parquet_file_that_unpacks_to_much_is_refused(tmp_path, monkeypatch):
    from hipp_ext.evals.data import parquet as reader

    monkeypatch.setattr(reader, "_MAX_BYTES", 2**22)
    file = tmp_path / "test.parquet"
    parquet(file, bytes(2**17), 100, use_dictionary=True)  # one picture, a hundred times
    assert file.stat().st_size < 2**20
    with pytest.raises(
        DataError,
        match="unpack to .* bytes; at most 4,194,304 are read. Write it with smaller row groups",
    ):
        write_scienceqa(tmp_path, tmp_path / "lmu", ["test"])
    monkeypatch.setattr(reader, "_MAX_ROWS", 99)
    with pytest.raises(DataError, match="claims to have 100 rows; at most 99 are read"):
        write_scienceqa(tmp_path, tmp_path / "lmu", ["test"])


def test_parquet_of_several_pictures_and_of_no_plain_file(tmp_path):
    parquet(tmp_path / "test.parquet", b"", 1, image=[{"bytes": png(), "path": ""}] * 2)
    with pytest.raises(DataError, match="a cell of the column image has 2 pictures in a list"):
        write_scienceqa(tmp_path, tmp_path / "lmu", ["test"])
    parquet(tmp_path / "test.parquet", b"", 1, image=[{"bytes": png(), "path": ""}])
    assert write_scienceqa(tmp_path, tmp_path / "lmu", ["test"])[0].is_file()
    (tmp_path / "test.parquet").unlink()
    os.mkfifo(tmp_path / "test.parquet")
    with pytest.raises(DataError, match="test.parquet is a pipe or a device"):
        write_scienceqa(tmp_path, tmp_path / "lmu", ["test"])


# ------------------------------------------------------------------------------- one output,
# several processes, kills

WRITER = """
import os, signal, sys, time
from pathlib import Path
from hipp_ext.evals.data import writing
from hipp_ext.evals.data.writing import Picture, file_pictures, write_table

folder, killed_at = Path(sys.argv[1]), sys.argv[2]
seen = []

def read(picture):
    seen.append(picture.name)
    if str(len(seen)) == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    return picture.read()

if killed_at == "end":  # the table is there, and what was kept for it is still to be removed
    Path.unlink = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
names = [f"{n}.png" for n in range(8)]
files = file_pictures(folder / "in", names)
found = [Picture(name=p.name, stamp=p.stamp, read=lambda p=p: read(p)) for p in files]
rows = [{"index": n, "question": f"q{n}"} for n in range(8)]
write_table(folder / sys.argv[3], rows, found, source={"a": 1})
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "in").mkdir()
    for n in range(8):
        Image.new("RGB", (9, 9), (30 * n, 5, 5)).save(tmp_path / f"in/{n}.png")
    return tmp_path


def writer(folder: Path, killed_at: str, name: str = "one/x.tsv") -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), killed_at, name], stderr=subprocess.PIPE
    )


def undisturbed(folder: Path) -> dict[str, bytes]:
    assert writer(folder, "never", "whole/x.tsv").wait() == 0
    return {file.name: file.read_bytes() for file in (folder / "whole").iterdir()}


def left(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "one").iterdir()}


def test_processes_that_write_one_output_leave_that_of_one(folder):
    running = [writer(folder, "never") for _ in range(3)]
    said = [(one.communicate()[1], one.returncode) for one in running]
    assert [code for _, code in said] == [0, 0, 0], said
    assert left(folder) == undisturbed(folder) and len(left(folder)) == 2


def test_a_killed_writer_leaves_nothing_behind_the_next(folder):
    whole = undisturbed(folder)
    for killed_at in ("1", "5", "end"):
        assert writer(folder, killed_at).wait() == -signal.SIGKILL
        assert ".x.tsv.partial" in left(folder)
        if killed_at != "1":
            assert writer(folder, "never").wait() == 0 and left(folder) == whole
            for file in (folder / "one").iterdir():
                file.unlink()


def test_a_killed_writer_lets_the_waiting_one_go_on(folder):
    killed, waiting = writer(folder, "6"), None
    while not (folder / "one/.x.tsv.partial").exists() and killed.poll() is None:
        time.sleep(0.01)
    waiting = writer(folder, "never")
    assert killed.wait() == -signal.SIGKILL and waiting.wait() == 0
    assert left(folder) == undisturbed(folder)


def test_what_is_kept_is_not_written_through_a_link(folder):
    (folder / "one").mkdir()
    (folder / "mine").write_text("mine")
    (folder / "one/.x.tsv.partial").symlink_to(folder / "mine")
    with pytest.raises(WriteError, match="x.tsv.partial cannot be written"):
        write_table(
            folder / "one/x.tsv", [{"index": 0}], file_pictures(folder / "in", ["0.png"]), source={}
        )
    assert (folder / "mine").read_text() == "mine"
