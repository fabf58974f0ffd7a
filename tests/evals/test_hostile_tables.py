"""Tables and pictures from strangers: read, or refused in a sentence; in little time and memory, by
no other program.
"""

import base64
import io
import os
import resource
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image
from vlm_tables import picture, pope_rows, scienceqa_rows, write_tsv

from hipp_ext.errors import DataError
from hipp_ext.evals.tables import read_table
from hipp_ext.files.untrusted import (
    PICTURE_PIXELS,
    parse_json,
    read_plain,
    rgb_picture,
    shown,
    the_only_one,
)

RED, BLUE = picture("red"), picture("blue")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture(autouse=True)
def bearable():
    """Nothing here may take seconds, gigabytes or a child process."""
    start, children = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    yield
    assert (
        time.monotonic() - start < 10
        and resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime == children
    )


def saved(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG of few bytes that says it is large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def asked(row: dict, **cells) -> dict:
    return {**row, **cells}


# --------------------------------------------------------------------------------------------------
# - pictures


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_pictures_of_five_kinds_are_read(kind):
    read = rgb_picture(saved(kind))
    assert read.size == (9, 7) and read.mode == "RGB" and read.getpixel((4, 4))[0] > 240


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (EPS, "no picture of a kind that is read \\(PNG, JPEG, WEBP, BMP, GIF\\)"),
        (saved("TIFF"), "no picture of a kind"),
        (saved("PPM"), "no picture of a kind"),
        (b"", "no picture of a kind"),
        (saved("PNG")[:-30], "cannot be decoded"),
        (saved("JPEG")[:300], "no picture of a kind|cannot be decoded"),
        (
            png_of_size(PICTURE_PIXELS // 1024 + 1, 1024),
            "it has 65537 x 1024 pixels; 67,108,864 pixels are decoded at most",
        ),
        (png_of_size(2**31 - 1, 2**31 - 1), "cannot be decoded: .*pixels"),
        (png_of_size(8000, 8000), "cannot be decoded"),
        (saved("JPEG").replace(b"\xff\xd9", b"\xff\xda" * 2**24), "9 x 7 pixels in 16777217 scans"),
    ],
)
def test_other_pictures_are_refused(data, message):
    with pytest.raises(DataError, match=message):
        rgb_picture(data)


# --------------------------------------------------------------------------------------------------
# - several pictures


@pytest.mark.parametrize(
    "several",
    [
        str([RED, BLUE]),
        f'["{RED}", "{BLUE}"]',
        f"['{RED}' '{BLUE}']",
        f" [ '{RED}' , \"{BLUE}\" ] ",
        "['0', '1']",
        "[]",
    ],
)
def test_several_pictures_in_a_cell_are_refused(tmp_path, several):
    rows = [asked(pope_rows()[0]), asked(pope_rows()[1], image=several)]
    with pytest.raises(
        DataError,
        match="row 1 has (2|no) pictures in a list; questions about exactly one picture are asked",
    ):
        read_table(write_tsv(tmp_path / "x.tsv", rows), tmp_path / "images")


@pytest.mark.parametrize(
    "several",
    [
        f"{RED},{BLUE}",
        f"{RED} {BLUE}",
        f"{RED}\n{BLUE}",
        f"{RED};{BLUE}",
        f"[{RED}, {BLUE}]",
        f"{{'a': '{RED}'}}",
    ],
)
def test_what_is_not_one_base64_text_is_refused(tmp_path, several):
    rows = [asked(pope_rows()[0]), asked(pope_rows()[1], image=several)]
    with pytest.raises(
        DataError, match="row 1: the image cannot be decoded: its cell is not one base64 text"
    ):
        read_table(write_tsv(tmp_path / "x.tsv", rows), tmp_path / "images")


def test_a_list_of_one_picture_is_that_picture(tmp_path):
    wrapped = "\n".join(RED[n : n + 76] for n in range(0, len(RED), 76))
    cells = [RED, str([RED]), f'["{RED}"]', wrapped, "0", "['0']"]
    rows = [asked(pope_rows()[0], index=n, image=cell) for n, cell in enumerate(cells)]
    table = read_table(write_tsv(tmp_path / "x.tsv", rows), tmp_path / "images")
    assert len(set(table.images)) == 1 and len(table.images) == 6
    (tmp_path / "a.png").write_bytes(base64.b64decode(RED))
    rows = [
        asked(pope_rows()[0], index=n, image_path=cell)
        for n, cell in enumerate(["a.png", "['a.png']", '["a.png"]'])
    ]
    assert (
        read_table(write_tsv(tmp_path / "y.tsv", rows, drop=("image",)), tmp_path).images
        == table.images[:3]
    )
    rows[1]["image_path"] = "['a.png', 'a.png']"
    with pytest.raises(DataError, match="row 1 has 2 pictures in a list"):
        read_table(write_tsv(tmp_path / "y.tsv", rows, drop=("image",)), tmp_path)
    with pytest.raises(DataError, match="row 0: the picture's cell holds 7, and a text is needed"):
        read_table(write_tsv(tmp_path / "z.tsv", [asked(pope_rows()[0], image="[7]")]), tmp_path)


# --------------------------------------------------------------------------------------------------
# - where pictures lie


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder "in" for a table, with files that are not images, and an image beside it."""
    inside = tmp_path / "in"
    (inside / "folder").mkdir(parents=True)
    for where in (tmp_path, inside, inside / "folder"):
        (where / "a.png").write_bytes(base64.b64decode(RED))
    (inside / "drawing.png").write_bytes(EPS)
    (inside / "bomb.png").write_bytes(png_of_size(60000, 60000))
    os.mkfifo(inside / "pipe.png")
    (inside / "out.png").symlink_to(tmp_path / "a.png")
    (inside / "near.png").symlink_to("folder/a.png")
    (inside / "zero.png").symlink_to("/dev/zero")
    (inside / "ring.png").symlink_to("ring.png")
    (inside / "up").symlink_to("..")
    with (inside / "huge.png").open("wb") as file:
        file.truncate(1 << 40)
    return inside


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("../a.png", "leads out of the folder of the table"),
        ("folder/../../a.png", "leads out of the folder"),
        ("/etc/hostname", "leads out of the folder"),
        ("/dev/zero", "leads out of the folder"),
        ("/proc/self/mem", "leads out of the folder"),
        ("out.png", "leads out of the folder"),
        ("up/a.png", "leads out of the folder"),
        ("zero.png", "leads out of the folder"),
        ("ring.png", "leads out of the folder|there is no picture"),
        ("pipe.png", "pipe.png is a pipe or a device; a picture must be a plain file"),
        ("folder", "folder is a folder, and a picture is needed"),
        ("huge.png", "huge.png has 1,099,511,627,776 bytes; a picture may have 268,435,456"),
        ("drawing.png", "cannot be decoded: it is no picture of a kind"),
        ("bomb.png", "cannot be decoded"),
        ("x" * 5000, "there is no picture"),
        ("a.png/b.png", "there is no picture"),
        ("\x1b[2Jgone.png", "there is no picture .*\ufffd\\[2Jgone.png"),
    ],
)
def test_paths_that_lead_elsewhere_are_refused(place, cell, message):
    rows = [asked(pope_rows()[0], image_path=cell)]
    with pytest.raises(DataError, match=f"row 0: .*{message}"):
        read_table(write_tsv(place / "x.tsv", rows, drop=("image",)), place / "images")


def test_paths_below_the_table_are_read(place):
    cells = [
        "a.png",
        "folder/a.png",
        "./a.png",
        "folder/../a.png",
        "near.png",
        str(place.resolve() / "a.png"),
    ]
    rows = [asked(pope_rows()[0], index=n, image_path=cell) for n, cell in enumerate(cells)]
    table = read_table(write_tsv(place / "x.tsv", rows, drop=("image",)), place / "images")
    assert len(set(table.images)) == 1 and table.frame["image_path"][4] == str(
        place.resolve() / "folder/a.png"
    )


def test_no_program_is_started_for_a_picture(place, monkeypatch):
    """Pillow would hand PostScript to Ghostscript."""
    for name in ("Popen", "check_call", "run"):
        monkeypatch.setattr(subprocess, name, lambda *a, **k: pytest.fail("a program was started"))
    rows = [asked(pope_rows()[0], image=base64.b64encode(EPS * 2).decode())]
    with pytest.raises(DataError, match="row 0: the image cannot be decoded: it is no picture"):
        read_table(write_tsv(place / "x.tsv", rows), place / "images")
    assert not (place / "images").exists()


# --------------------------------------------------------------------------------------------------
# - tables


HEAD = "index\timage\tquestion\tanswer\tcategory\n"


def row(**cells: str) -> bytes:
    filled = {
        "index": "0",
        "image": RED,
        "question": "q",
        "answer": "Yes",
        "category": "random",
    } | cells
    return (HEAD + "\t".join(filled.values()) + "\n").encode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (row(question="a\0b"), "it holds null bytes"),
        (bytes(1000), "it holds null bytes"),
        (row().replace(b"\tq\t", b"\t\xff\xfe\t"), "cannot be read as tab-separated UTF-8 text"),
        (b"\x1f\x8b\x08" + bytes(range(1, 99)), "cannot be read as tab-separated|missing column"),
        (row() + b'1\t"' + b"x" * 999, "cannot be read as tab-separated"),
        (b"\t" * 10**6 + b"\n", "a row has more than 1,000 cells"),
        (b'"\n"\t' * 10**6 + b"\n", "a row has more than 1,000 cells"),
        (HEAD.encode() + b"\n" + b"\t" * 10**6 + b"\n", "a row has more than 1,000 cells"),
        (HEAD.encode() + b'"a\n"\t' * 10**6 + b"\n", "a row has more than 1,000 cells"),
        (row() + b"\t" * 10**6 + b"\n", "cannot be read as tab-separated"),
        (
            row(category=",".join(map(str, range(10**5)))),
            "names 100,000 splits; at most 100 can be scored",
        ),
        (row(image="A" * 10**6), "the image cannot be decoded"),
        (row(image="A" * (10**6 + 1)), "the image is not valid base64"),
        (row(image="[" * 10**5 + "]" * 10**5), "the image cannot be decoded"),
        (row(image="['" + "\\" * 10**5 + "']"), "the image cannot be decoded"),
        (row(image="1e999"), "is neither a base64 picture nor the index"),
        (row(answer="1" + "0" * 400), "has the answer"),
        (row(index="", question="1e999"), "has no index"),
    ],
)
def test_hostile_tables_are_refused(tmp_path, text, message):
    (tmp_path / "x.tsv").write_bytes(text)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "x.tsv", tmp_path / "images")


@pytest.mark.parametrize("index", ["1e999", "1" + "0" * 400, "-0", "\u202e1", "x" * 10**6, "nan "])
def test_odd_but_whole_tables_are_read(tmp_path, index):
    (tmp_path / "x.tsv").write_bytes(row(index=index))
    assert len(read_table(tmp_path / "x.tsv", tmp_path / "images").frame) == 1


def test_only_plain_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.tsv")
    (tmp_path / "zero.tsv").symlink_to("/dev/zero")
    for name, message in (
        ("pipe.tsv", "is a pipe or a device; a table must be a plain file"),
        ("zero.tsv", "is a pipe or a device"),
        (".", "is a folder, and a table is needed"),
        ("gone.tsv", "gone.tsv cannot be read: No such file"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            read_table(tmp_path / name, tmp_path)
    with (tmp_path / "huge.tsv").open("wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(DataError, match="has 8,589,934,592 bytes; a table may have 4,294,967,296"):
        read_table(tmp_path / "huge.tsv", tmp_path)
    if sys.platform == "linux":
        with pytest.raises(DataError, match="has more than 10 bytes"):
            read_plain("/proc/self/status", 10)  # its size is said to be 0


def test_cells_of_choices_are_bounded_too(tmp_path):
    rows = scienceqa_rows()
    rows[0]["image"] = str([RED, BLUE])
    with pytest.raises(DataError, match="row 10 has 2 pictures in a list"):
        read_table(write_tsv(tmp_path / "x.tsv", rows), tmp_path / "images")


# --------------------------------------------------------------------------------------------------
# - small parts


@pytest.mark.parametrize("text", ["[" * 10**5, "{" * 9, "", "1" * 5000, b"\xff", "nul"])
def test_json_that_is_none_is_refused(text):
    with pytest.raises(DataError, match="x is not valid JSON"):
        parse_json(text, "x")


def test_a_list_is_recognised_in_every_spelling():
    assert (
        the_only_one("plain", "x") == "plain"
        and the_only_one(["a"], "x") == "a"
        and the_only_one("['a']", "x") == "a"
    )
    assert (
        the_only_one(r"['C:\\a\'b']", "x") == r"C:\a'b"
        and the_only_one("[a.png]", "x") == "[a.png]"
    )
    for several in (["a", "b"], "['a', \"b\"]", '["a", "b"]', "['a'\n 'b']", ("a", "b")):
        with pytest.raises(DataError, match="x has 2 pictures"):
            the_only_one(several, "x")


def test_what_steers_a_terminal_is_not_shown():
    assert (
        shown("a\x1b[31m\u202eb\nc\u3000d") == "a\ufffd[31m\ufffdb\ufffdc\u3000d"
        and shown("x" * 9, 4) == "xxx\u2026"
    )
