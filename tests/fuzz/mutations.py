"""Damage to files, by seed: bytes, JSON, safetensors headers, cells of tables, and files of a
folder.
"""

import base64
import contextlib
import io
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

DEEP = "@deep@"  # becomes JSON nested 100,000 deep
TWICE = "@twice@"  # before a key: becomes a key that is there already
TEXTS = (
    "",
    " ",
    "\0",
    "a\0b",
    "\ud800",
    "é\u202e",
    "\x1b[31m",
    "[/b]",
    "[bold",
    "<script>alert(1)</script>",
    '"><img src=x onerror=a()>',
    "%s{0}${x}",
    "NaN",
    "inf",
    "None",
    "NA",
    "1e999",
    "../../secret.png",
    "../secret.png",
    "/etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "fifo",
    "x" * 5_000,
    "x/" * 300,
    "C:\\x",
    "__class__",
    "a\tb\nc",
    "-1",
    "9" * 5_000,
    "0-9999999",
    DEEP,
)
NUMBERS = (
    0,
    -1,
    1,
    2,
    0.5,
    -0.0,
    2**31,
    2**53 + 1,
    2**63,
    -(2**63) - 1,
    10**400,
    1e308,
    -1e308,
    5e-324,
    math.inf,
    -math.inf,
    math.nan,
)
VALUES = (
    *TEXTS,
    *NUMBERS,
    None,
    True,
    False,
    [],
    {},
    [[]],
    {"a": {}},
    [None],
    {"": ""},
    [1] * 300,
    {"__proto__": 1},
)
REFUSED = frozenset(["EPS", "TIFF", "PPM", "TGA", "ICO"])  # decoders that no data set needs
BYTES = (
    b"\0",
    b"\xff\xfe",
    b"\r\n",
    b"\xc3\x28",
    b"{",
    b"]",
    b'"',
    b"\t",
    b",",
    b"NaN",
    b"1e999",
    b"-",
    b"9" * 400,
    b"\xed\xa0\x80",
)


def mutate_folder(folder: Path, other: Path, rng: Random) -> str:
    """Damage one or several files in `folder`; returns what was done. `other` is an undamaged
    folder to splice from.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        file = rng.choice(files)
        name = file.relative_to(folder).as_posix()
        if rng.random() < 0.06 and len(files) > 1:
            done.append(f"{name}: {_mutate_place(file, rng.choice(files), rng)}")
        elif file.is_file():
            splice = rng.choice(files)
            source = other / splice.relative_to(folder)
            data, what = mutate(
                file.read_bytes(),
                file.suffix,
                rng,
                source.read_bytes() if source.is_file() else b"",
            )
            file.write_bytes(data)
            done.append(f"{name}: {what}")
    return "; ".join(done)


def _mutate_place(file: Path, other: Path, rng: Random) -> str:
    """Something else where a file is expected."""
    what = rng.choice(
        ("deleted", "emptied", "a folder", f"copy of {other.name}", "no right to read")
    )
    if file.is_dir():
        return "left a folder"
    content = other.read_bytes() if other.is_file() else b""
    file.unlink(missing_ok=True)
    if what == "emptied":
        file.touch()
    elif what == "a folder":
        file.mkdir()
    elif what.startswith("copy"):
        file.write_bytes(content)
    elif what.startswith("no right"):
        file.symlink_to("gone")  # root may read everything, so: a link to nothing
    return what


def mutate(data: bytes, suffix: str, rng: Random, splice: bytes = b"") -> tuple[bytes, str]:
    """(damaged data, what was done); formats that the suffix names are damaged in their structure
    two times out of three.
    """
    structured = STRUCTURED.get(suffix)
    if structured and rng.random() < 0.67:
        with contextlib.suppress(
            Exception
        ):  # what is damaged already may be no such format any more
            return structured(data, rng)
    return mutate_bytes(data, rng, splice)


def mutate_bytes(data: bytes, rng: Random, splice: bytes = b"") -> tuple[bytes, str]:
    """Damage without regard to the format, near the beginning as often as anywhere."""
    size = len(data)
    at = rng.randrange(min(size, rng.choice((64, 1024, size))) or 1) if size else 0
    length = min(rng.choice((1, 1, 2, 8, 64, 1000)), max(size - at, 0))
    kind = rng.choice(
        ("flip", "flip", "set", "delete", "repeat", "insert", "truncate", "swap", "splice", "fill")
    )
    head, middle, tail = data[:at], data[at : at + length], data[at + length :]
    if kind == "flip" and size:
        new = head + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    elif kind == "set":
        new = head + rng.randbytes(length) + tail
    elif kind == "delete":
        new = head + tail
    elif kind == "repeat":
        new = head + middle * rng.choice((2, 3, 100)) + tail
    elif kind == "truncate":
        new = head
    elif kind == "swap":
        new = tail + middle + head
    elif kind == "splice" and splice:
        start = rng.randrange(len(splice))
        new = head + splice[start : start + rng.choice((8, 64, 4096))] + tail
    elif kind == "fill":
        new = head + rng.choice((b"\0", b"\xff", b" ")) * length + tail
    else:
        kind, new = "insert", head + rng.choice(BYTES) + data[at:]
    return new, f"{kind} {length} bytes at {at} of {size}"


# --- JSON


def mutate_json(data: bytes, rng: Random) -> tuple[bytes, str]:
    """One change of a value, a key, a list or a number somewhere in the document."""
    value, what = mutate_value(json.loads(data), rng)
    return dump(value), what


def mutate_lines(data: bytes, rng: Random) -> tuple[bytes, str]:
    """A change of one JSON line, or of the order and number of lines."""
    lines = data.splitlines()
    row, kind = rng.randrange(len(lines)), rng.random()
    if kind < 0.1:
        lines.insert(rng.randrange(len(lines) + 1), lines[row])
    elif kind < 0.2:
        del lines[row]
    else:
        lines[row], what = mutate_json(lines[row], rng)
        return b"\n".join(lines) + b"\n", f"line {row + 1}: {what}"
    return b"\n".join(lines) + b"\n", f"line {row + 1} {'repeated' if kind < 0.1 else 'removed'}"


def mutate_value(value: Any, rng: Random) -> tuple[Any, str]:
    """A changed copy of a JSON value, and what was changed where."""
    holder = [value]
    places: list[tuple[Any, Any, str]] = list(_places(holder, ""))
    parent, key, path = rng.choice(places)
    what = _change(parent, key, rng, places)
    return holder[0], f"{path or 'document'} {what}"


def _places(parent: Any, path: str) -> Any:
    for key, child in parent.items() if isinstance(parent, dict) else enumerate(parent):
        own = f"{path}.{key}" if isinstance(parent, dict) or path else path
        yield parent, key, own
        if isinstance(child, dict | list):
            yield from _places(child, own or "$")


def _change(parent: Any, key: Any, rng: Random, places: list) -> str:
    old = parent[key]
    if isinstance(old, str) and old[:1] in ("{", "[") and rng.random() < 0.8:  # JSON within JSON
        with contextlib.suppress(ValueError):
            inner, what = mutate_value(json.loads(old), rng)
            parent[key] = dump(inner).decode(errors="surrogateescape")
            return f"inside: {what}"
    kind = rng.choice(
        (
            "value",
            "value",
            "value",
            "near",
            "near",
            "delete",
            "key",
            "twice",
            "unknown",
            "list",
            "swap",
        )
    )
    if kind == "near" and isinstance(old, int | float) and not isinstance(old, bool):
        parent[key] = rng.choice(
            (old + 1, old - 1, -old, old * 1000, old / 3, float(old), str(old), bool(old), [old])
        )
    elif kind == "near" and isinstance(old, str) and old:
        text, _ = mutate_bytes(old.encode(errors="replace"), rng)
        parent[key] = text.decode(errors="replace")
    elif kind == "delete":
        del parent[key]
    elif kind == "key" and isinstance(parent, dict):
        parent[rng.choice(TEXTS)] = parent.pop(key)
    elif kind == "twice" and isinstance(parent, dict):
        parent[f"{TWICE}{key}"] = rng.choice(VALUES)
    elif kind == "unknown" and isinstance(parent, dict):
        parent[
            rng.choice(("unknown", "auto_map", "format", "_name_or_path", "quantization_config"))
        ] = rng.choice(VALUES)
    elif kind == "list" and isinstance(old, list) and old:
        parent[key] = rng.choice(
            (old * 2, old * 500, old[::-1], old[:-1], [old], dict(enumerate(old)))
        )
    elif kind == "swap":
        there, place, _ = rng.choice(places)
        with contextlib.suppress(KeyError, IndexError):
            parent[key], there[place] = there[place], old if there is not parent[key] else None
    else:
        kind, parent[key] = "value", rng.choice(VALUES)
    return f"{kind}: {str(parent[key])[:40] if kind in ('value', 'near') else ''}"


def dump(value: Any) -> bytes:
    """JSON text, with what `DEEP` and `TWICE` stand for, NaN and Infinity as Python writes them."""
    text = json.dumps(value, default=str, separators=(",", ":"))
    return (
        text.replace(f'"{TWICE}', '"').replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000).encode()
    )


# --- tensors and tables


def mutate_safetensors(data: bytes, rng: Random) -> tuple[bytes, str]:
    """A change of the header, of its length, or of the tensors' numbers."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = rng.random()
    if kind < 0.6:
        header, what = mutate_json(header, rng)
        return struct.pack("<Q", len(header)) + header + body, f"header {what}"
    if kind < 0.7:
        odd = rng.choice((0, 1, length - 1, length + 1, length * 2, 2**31, 2**63, 2**64 - 1))
        return struct.pack("<Q", odd) + header + body, f"header length {odd}"
    number = rng.choice((math.nan, math.inf, -math.inf, 1e38, -1.0, 0.0))
    at = 4 * rng.randrange(max(len(body) // 4, 1))
    count = rng.choice((1, 1, 100, len(body) // 4 - at // 4))
    new = struct.pack("<f", number) * count
    return data[: 8 + length] + body[:at] + new + body[
        at + 4 * count :
    ], f"{count} numbers from {at // 4} are {number}"


def mutate_tsv(data: bytes, rng: Random) -> tuple[bytes, str]:
    """A change of one cell, of a column's name, or of the number of cells; a picture's cell may
    become another picture.
    """
    rows = [line.split(b"\t") for line in data.split(b"\n")[:-1]]
    row, column = rng.randrange(len(rows)), rng.randrange(len(rows[0]))
    what, name = f"row {row} column {column}", rows[0][column].strip(b'"')
    if row and name == b"image" and rng.random() < 0.7:
        hostile, picture = rng.choice(sorted(PICTURES.items()))
        rows[row][column] = base64.b64encode(picture)
        return b"\n".join(b"\t".join(r) for r in rows) + b"\n", f"{what}: {hostile}"
    kind = rng.choice(("cell", "cell", "cell", "swap", "delete", "bytes"))
    if kind == "cell":
        cell = str(rng.choice(VALUES)).replace(DEEP, "(" * 90_000)
        rows[row][column] = cell.encode(errors="surrogatepass")
    elif kind == "swap":
        other = rng.randrange(len(rows))
        rows[row][column], rows[other][-1] = rows[other][-1], rows[row][column]
    elif kind == "delete":
        del rows[row][column]
    else:
        rows[row][column], _ = mutate_bytes(rows[row][column], rng)
    return b"\n".join(b"\t".join(r) for r in rows) + b"\n", f"{what}: {kind}"


def mutate_parquet(data: bytes, rng: Random) -> tuple[bytes, str]:
    """The table with a column of other values, of another type, or without it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(data))
    at = rng.randrange(table.num_columns)
    name, odd = (
        table.column_names[at],
        rng.choice(
            (None, 1, -1, 2**40, 0.5, "", "x", [], ["a"] * 30, {"bytes": b""}, {"path": "x"})
        ),
    )
    changed = table.remove_column(at)
    if rng.random() < 0.8:
        changed = changed.add_column(at, name, [pa.array([odd] * table.num_rows)])
    pq.write_table(changed, buffer := io.BytesIO())
    return buffer.getvalue(), f"column {name} is {odd!r} or gone"


def mutate_picture(data: bytes, rng: Random) -> tuple[bytes, str]:
    """Another, hostile picture."""
    name, picture = rng.choice(sorted(PICTURES.items()))
    return picture, name


def _pictures() -> dict[str, bytes]:
    """Pictures that no data set holds; see the names."""
    from PIL import Image

    def saved(kind: str, image: Image.Image, **options: Any) -> bytes:
        image.save(buffer := io.BytesIO(), kind, **options)
        return buffer.getvalue()

    small, black = Image.new("RGB", (8, 8), "red"), Image.new("1", (17_000, 10_000))
    bomb = saved("PNG", black)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\n%%EOF\n"
    gif = saved("GIF", small)
    huge = gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:]
    jpeg, png = saved("JPEG", small), saved("PNG", small)
    return {
        "EPS": eps,
        "TIFF": saved("TIFF", small),
        "PPM": saved("PPM", small),
        "TGA": saved("TGA", small),
        "ICO": saved("ICO", small),
        "PDF": saved("PDF", small),
        "bomb": bomb,
        "GIF of 65,535 pixels": huge,
        "half a PNG": bomb[: len(bomb) // 2],
        "half a JPEG": jpeg[: len(jpeg) // 2],
        "no picture": b"PNG",
        "nothing": b"",
        "one pixel": saved("PNG", small.crop((0, 0, 1, 1))),
        "PNG of 2**31 pixels": png[:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + png[24:],
        "text in a PNG": _text_bomb(png),
    }


def _text_bomb(png: bytes) -> bytes:
    """A PNG with a compressed comment of 20 MB."""
    import zlib

    chunk = b"zTXtComment\0\0" + zlib.compress(b"\0" * 20_000_000, 1)
    return (
        png[:33]
        + struct.pack(">I", len(chunk) - 4)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + png[33:]
    )


class _Lazy(dict):
    """Pictures are drawn when the first is needed."""

    def items(self) -> Any:
        if not self:
            self.update(_pictures())
        return super().items()


PICTURES: dict[str, bytes] = _Lazy()
STRUCTURED: dict[str, Callable[[bytes, Random], tuple[bytes, str]]] = {
    ".json": mutate_json,
    ".jsonl": mutate_lines,
    ".safetensors": mutate_safetensors,
    ".tsv": mutate_tsv,
    ".parquet": mutate_parquet,
    ".png": mutate_picture,
    ".JPEG": mutate_picture,
}


def copy_folder(source: Path, target: Path) -> None:
    """`target` becomes a copy of `source`; in each of its folders, but those of models, lies a FIFO
    that nobody writes to.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    for folder, _, names in os.walk(target):
        if "config.json" not in names:
            os.mkfifo(Path(folder, "fifo"))
