"""SVHN, CIFAR-10/100 and Tiny-ImageNet from files as their authors publish them.

The files may come from anywhere: each reader knows the one structure that its set has, measures before it allocates, opens
nothing outside the set's folder, and refuses everything else.
"""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hipp_ext.errors import DataError
from hipp_ext.files.untrusted import FORMATS
from hipp_ext.robust.batch_files import BatchFileError, read_batch_file
from hipp_ext.robust.data import LAYOUTS, ImageData, Images

MOST_TEXT = 16 * 2**20  # bytes of a list of names
MOST_MATRICES = 512 * 2**20  # bytes of an SVHN file when unpacked; the larger one has 225 MB
CHUNK = 2**20
PLAIN, PACKED = 14, 15  # kinds of parts of a MATLAB file: a matrix, a compressed one
MOST_PARTS = 64
_LONGEST_NAME = 255  # bytes of a file name, of every common file system


def svhn(root: Path) -> ImageData:
    """Street View House Numbers, format 2."""
    parts = []
    for split in ("train", "test"):
        path = _find(root, "svhn", f"{split}_32x32.mat")
        try:
            x, y = _matrices(path)
        except Exception as error:  # scipy raises whatever a damaged file brings up
            raise _damaged("svhn", path, error) from error
        labels = (
            torch.from_numpy(y.astype(np.int64)).flatten() % 10
        )  # the files say 10 for the digit 0
        parts.append(
            _images("svhn", path, torch.from_numpy(x).permute(3, 2, 0, 1).contiguous(), labels)
        )
    return ImageData(name="svhn", train=parts[0], test=parts[1], classes=tuple("0123456789"))


def _matrices(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """X (32, 32, 3, n) and y; only what the file's directory says to be these is loaded."""
    from scipy.io import loadmat, whosmat

    _check_unpacked(path)
    there = whosmat(path)
    held = {name: (shape, kind) for name, shape, kind in there}
    x, y = held.get("X", ((), "")), held.get("y", ((), ""))
    numbers = ("uint8", "int8", "int16", "uint16", "int32", "uint32", "double", "single")
    if (
        len(held) < len(there)
        or x[1] != "uint8"
        or tuple(x[0][:3]) != (32, 32, 3)
        or len(x[0]) != 4
        or y[1] not in numbers
    ):
        raise ValueError(
            f"X must be bytes of shape (32, 32, 3, n) and y labels; it holds {sorted(held)[:8]}"
        )
    if 3072 * x[0][3] > MOST_MATRICES or tuple(y[0]) not in ((x[0][3], 1), (1, x[0][3])):
        raise ValueError(f"X has the shape {x[0]} and y {y[0]}")
    content = loadmat(path, variable_names=["X", "y"])
    pictures, labels = content["X"], content["y"]
    if (
        pictures.dtype != np.uint8
        or pictures.shape != tuple(x[0])
        or not np.isin(labels, np.arange(11)).all()
    ):
        raise ValueError("X must be bytes of shape (32, 32, 3, n) and y labels from 1 to 10")
    return pictures, labels


def _check_unpacked(path: Path) -> None:
    """Raise ValueError where the compressed parts of a MATLAB file are larger than any file of the set."""
    if path.stat().st_size > MOST_MATRICES:
        raise ValueError(f"files of up to {MOST_MATRICES >> 20} MB are read")
    left, parts = MOST_MATRICES, 0
    with path.open("rb") as file:
        order = "little" if file.read(128)[126:128] == b"IM" else "big"
        while len(tag := file.read(8)) == 8:
            kind, size = int.from_bytes(tag[:4], order), int.from_bytes(tag[4:], order)  # type: ignore[arg-type]
            parts += 1
            if kind not in (PLAIN, PACKED) or parts > MOST_PARTS:
                raise ValueError("it is made of something else than a few matrices")
            if kind == PLAIN:
                file.seek(size, 1)
                continue
            unpacker, end = zlib.decompressobj(), file.tell() + size
            while file.tell() < end and (packed := file.read(min(CHUNK, end - file.tell()))):
                while packed and left >= 0:
                    left -= len(unpacker.decompress(packed, CHUNK))
                    packed = unpacker.unconsumed_tail
                if left < 0:
                    raise ValueError(f"unpacked it has more than {MOST_MATRICES >> 20} MB")


def cifar10(root: Path) -> ImageData:
    """CIFAR-10, the Python version."""
    train = [_find(root, "cifar10", f"data_batch_{i}", "cifar-10-batches-py") for i in range(1, 6)]
    test, meta = (
        _find(root, "cifar10", n, "cifar-10-batches-py") for n in ("test_batch", "batches.meta")
    )
    return _cifar("cifar10", train, test, meta, b"labels", b"label_names")


def cifar100(root: Path) -> ImageData:
    """CIFAR-100 with its fine labels, the Python version."""
    train, test, meta = (
        _find(root, "cifar100", n, "cifar-100-python") for n in ("train", "test", "meta")
    )
    return _cifar("cifar100", [train], test, meta, b"fine_labels", b"fine_label_names")


def _cifar(
    name: str, train: Sequence[Path], test: Path, meta: Path, labels_key: bytes, names_key: bytes
) -> ImageData:
    def read(paths: Sequence[Path]) -> Images:
        parts = [_cifar_batch(name, path, labels_key) for path in paths]
        return Images(
            images=torch.cat([p.images for p in parts]), labels=torch.cat([p.labels for p in parts])
        )

    names = _batch(name, meta).get(names_key)
    if type(names) is not list or not all(type(n) is bytes for n in names):
        raise _damaged(name, meta, f"{names_key.decode()} must be a list of names")
    classes = tuple(n.decode(errors="replace") for n in names)
    return ImageData(name=name, train=read(train), test=read([test]), classes=classes, mirror=True)


def _cifar_batch(name: str, path: Path, labels_key: bytes) -> Images:
    content = _batch(name, path)
    x, y = content.get(b"data"), content.get(labels_key)
    if not isinstance(x, np.ndarray) or x.ndim != 2 or x.shape[1] != 3072 or type(y) is not list:
        raise _damaged(
            name, path, f"data must be bytes of shape (n, 3072) and {labels_key.decode()} a list"
        )
    if not all(type(label) is int and abs(label) < 2**31 for label in y):
        raise _damaged(name, path, f"{labels_key.decode()} must be whole numbers")
    pictures = torch.from_numpy(np.array(x, order="C")).view(-1, 3, 32, 32)
    return _images(name, path, pictures, torch.tensor(y, dtype=torch.int64))


def _batch(name: str, path: Path) -> dict:
    try:
        return read_batch_file(path)
    except BatchFileError as error:
        raise _damaged(name, path, error) from error


def tiny_imagenet(root: Path) -> ImageData:
    """Tiny-ImageNet as it is unpacked; its validation pictures are the test set."""
    wnids = _find(root, "tiny-imagenet", "wnids.txt", "tiny-imagenet-200")
    base, names = wnids.parent, _text(wnids).split()
    if not names or len(set(names)) < len(names) or not all(map(_is_plain, names)):
        raise _damaged("tiny-imagenet", wnids, "a name of a class on each line is expected")
    number = {n: i for i, n in enumerate(names)}
    train = [
        (p, i)
        for n, i in number.items()
        for p in sorted((base / "train" / n / "images").glob("*.JPEG"))
    ]
    empty = sorted(set(names) - {names[i] for _, i in train})
    if empty:
        raise _damaged(
            "tiny-imagenet",
            base / "train",
            f"no pictures of {empty[:4]} in train/{empty[0]}/images",
        )
    annotations = _find(base, "tiny-imagenet", "val_annotations.txt", "val")
    test: dict[str, int] = {}
    for line in _text(annotations).splitlines():
        fields = line.split("\t")
        if (
            len(fields) < 2
            or fields[1] not in number
            or not _is_plain(fields[0])
            or fields[0] in test
        ):
            raise _damaged(
                "tiny-imagenet", annotations, f"a line without a known class: {line[:60]!r}"
            )
        test[fields[0]] = number[fields[1]]
    validation = [(base / "val" / "images" / name, label) for name, label in test.items()]
    if missing := [p for p, _ in validation if not p.is_file()]:
        raise _damaged("tiny-imagenet", missing[0], "it is missing")
    parts = [_read_pictures(rows) for rows in (train, validation)]
    return ImageData(
        name="tiny-imagenet", train=parts[0], test=parts[1], classes=tuple(names), mirror=True
    )


def _read_pictures(rows: Sequence[tuple[Path, int]]) -> Images:
    pictures = torch.empty(len(rows), 3, 64, 64, dtype=torch.uint8)
    for i, (path, _) in enumerate(rows):
        try:
            pictures[i] = _picture(path)
        except Exception as error:  # Pillow's decoders raise whatever a damaged file brings up
            raise _damaged("tiny-imagenet", path, error) from error
    return Images(
        images=pictures, labels=torch.tensor([label for _, label in rows], dtype=torch.int64)
    )


def _picture(path: Path) -> Tensor:
    from PIL import Image

    if not path.is_file():  # a pipe would be waited for
        raise ValueError("it is no file")
    with Image.open(path, formats=FORMATS) as picture:
        if picture.size != (64, 64):  # before its pixels are unpacked
            raise ValueError(f"64x64 pixels were expected, got {picture.size[0]}x{picture.size[1]}")
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def _is_plain(name: str) -> bool:
    """Whether a name from a file is that of a file or folder, and leads nowhere else."""
    if (
        name in ("", ".", "..")
        or "\\" in name
        or len(name.encode(errors="replace")) > _LONGEST_NAME
    ):
        return False
    return name.isprintable() and Path(name).name == name


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MOST_TEXT:
            raise ValueError(f"texts of up to {MOST_TEXT >> 20} MB are read")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _damaged("tiny-imagenet", path, error) from error


def _images(name: str, path: Path, images: Tensor, labels: Tensor) -> Images:
    if len(images) != len(labels):
        raise _damaged(name, path, f"{len(images)} pictures and {len(labels)} labels")
    return Images(images=images, labels=labels)


def _find(root: Path, name: str, file: str, folder: str = "") -> Path:
    """`file` in `root`, or in `folder` of it."""
    for path in (root / folder / file, root / file):
        if path.is_file():
            return path
    raise DataError(
        f"{name}: {root} has no {folder + '/' if folder else ''}{file}. Expected there: {LAYOUTS[name]}."
    )


def _damaged(name: str, path: Path, why: object) -> DataError:
    return DataError(
        f"{name}: {path} is damaged or truncated ({why}). Expected layout: {LAYOUTS[name]}."
    )


READERS: dict[str, Callable[[Path], ImageData]] = {
    "svhn": svhn,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "tiny-imagenet": tiny_imagenet,
}
