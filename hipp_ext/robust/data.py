"""Image sets for robust pruning: scikit-learn's digits, and SVHN, CIFAR-10/100 and Tiny-ImageNet from local folders.

Nothing is downloaded. Files are read in the formats that their authors publish, and checked.
"""

import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hipp_ext.errors import DataError, MissingExtraError

LAYOUTS = {
    "svhn": "train_32x32.mat and test_32x32.mat (format 2, http://ufldl.stanford.edu/housenumbers)",
    "cifar10": "cifar-10-batches-py/ with data_batch_1 to data_batch_5, test_batch and batches.meta (the Python version)",
    "cifar100": "cifar-100-python/ with train, test and meta (the Python version)",
    "tiny-imagenet": "tiny-imagenet-200/ with wnids.txt, train/<wnid>/images/*.JPEG, val/images/*.JPEG and "
    "val/val_annotations.txt",
}
DATA_NAMES = ("digits", *LAYOUTS)


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """Pictures with their classes.

    Attributes:
        images: (rows, channels, height, width), bytes, or float32 in [0, 1].
        labels: (rows,) int64.
    """

    images: Tensor
    labels: Int[Tensor, " rows"]

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """(float32 images in [0, 1], labels) of some rows."""
        images = self.images[index]
        return (images.float() / 255 if images.dtype == torch.uint8 else images), self.labels[index]

    def first(self, count: int) -> "Images":
        """The first rows."""
        return Images(images=self.images[:count], labels=self.labels[:count])

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.rows(slice(start, start + size))


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageData:
    """Training and test images of one set.

    Raises:
        DataError: images outside [0, 1], labels that are no class, or rows and labels that do not match.
    """

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    mirror: bool = False  # whether a mirrored picture is still of its class
    pad: int = 4  # pixels of the random shift in training

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            check_images(getattr(self, split), len(self.classes), f"{self.name} {split}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return tuple(self.train.images.shape[1:])  # type: ignore[return-value]


def check_images(images: Images, classes: int, what: str) -> None:
    """Raise DataError unless rows, range and labels are as `Images` says."""
    x, y = images.images, images.labels
    if x.dim() != 4 or len(x) != len(y) or not len(y):
        raise DataError(
            f"{what}: images of shape (rows, channels, height, width) are needed; got {tuple(x.shape)}, {len(y)} labels."
        )
    if x.dtype != torch.uint8:
        if not x.is_floating_point():
            raise DataError(f"{what}: images must be bytes or floating point in [0, 1], got {x.dtype}.")
        if not bool(((x >= 0) & (x <= 1)).all()):
            raise DataError(
                f"{what}: images must lie in [0, 1], got {float(x.min()):.4g} to {float(x.max()):.4g}. Give them as they are "
                "before normalisation, and put the normalisation into the model: epsilon is measured in these units."
            )
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise DataError(
            f"{what}: labels must be 0 to {classes - 1} for {classes} classes, got {int(y.min())} to {int(y.max())}."
        )


def load_data(name: str, root: str | Path | None = None, *, seed: int = 0) -> ImageData:
    """The set called `name`: digits (embedded), svhn, cifar10, cifar100 or tiny-imagenet.

    Args:
        root: the folder with the set's files in their published layout, or its parent; digits needs none.
        seed: of the digits' split.

    Raises:
        DataError: an unknown name, missing, damaged or truncated files; the message says which layout was expected.
        MissingExtraError: scikit-learn is not installed (digits).
    """
    if name == "digits":
        return _digits(seed)
    readers: dict[str, Callable[[Path], ImageData]] = {
        "svhn": _svhn, "cifar10": _cifar10, "cifar100": _cifar100, "tiny-imagenet": _tiny_imagenet,
    }  # fmt: skip
    if name not in readers:
        raise DataError(f"Known image sets are {', '.join(DATA_NAMES)}; got {name!r}.")
    if root is None or not Path(root).is_dir():
        raise DataError(f"{name} is read from a local folder, got {root}. Expected there: {LAYOUTS[name]}.")
    return readers[name](Path(root))


def _digits(seed: int) -> ImageData:
    """1,797 digits of 8x8 pixels, scaled up to 16x16; 1,200 to train on, drawn class by class."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError:
        raise MissingExtraError("scikit-learn", "robust") from None
    raw: Any = load_digits()
    images = torch.from_numpy(raw.images).float()[:, None] / 16
    images = torch.nn.functional.interpolate(images, size=(16, 16), mode="bilinear").clamp(0, 1)
    labels = torch.from_numpy(raw.target).long()
    train, test = (
        torch.from_numpy(i)
        for i in train_test_split(np.arange(len(labels)), train_size=1200, stratify=raw.target, random_state=seed)
    )
    parts = [Images(images=images[i].contiguous(), labels=labels[i]) for i in (train, test)]
    return ImageData(name="digits", train=parts[0], test=parts[1], classes=tuple("0123456789"), pad=2)


def _svhn(root: Path) -> ImageData:
    from scipy.io import loadmat

    parts = []
    for split in ("train", "test"):
        path = _find(root, "svhn", f"{split}_32x32.mat")
        try:
            content = loadmat(path)
        except Exception as error:  # scipy raises whatever a damaged file brings up
            raise _damaged("svhn", path, error) from error
        x, y = content.get("X"), content.get("y")
        if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 4 or x.shape[:3] != (32, 32, 3) or y is None:
            raise _damaged("svhn", path, f"X must be bytes of shape (32, 32, 3, n) and y labels; it holds {sorted(content)}")
        labels = torch.from_numpy(y.astype(np.int64)).flatten() % 10  # the files say 10 for the digit 0
        parts.append(_images("svhn", path, torch.from_numpy(x).permute(3, 2, 0, 1).contiguous(), labels))
    return ImageData(name="svhn", train=parts[0], test=parts[1], classes=tuple("0123456789"))


def _cifar10(root: Path) -> ImageData:
    train = [_find(root, "cifar10", f"data_batch_{i}", "cifar-10-batches-py") for i in range(1, 6)]
    test, meta = (_find(root, "cifar10", n, "cifar-10-batches-py") for n in ("test_batch", "batches.meta"))
    return _cifar("cifar10", train, test, meta, b"labels", b"label_names")


def _cifar100(root: Path) -> ImageData:
    train, test, meta = (_find(root, "cifar100", n, "cifar-100-python") for n in ("train", "test", "meta"))
    return _cifar("cifar100", [train], test, meta, b"fine_labels", b"fine_label_names")


def _cifar(name: str, train: Sequence[Path], test: Path, meta: Path, labels_key: bytes, names_key: bytes) -> ImageData:
    def read(paths: Sequence[Path]) -> Images:
        pictures, labels = [], []
        for path in paths:
            content = _read_pickle(name, path)
            x, y = content.get(b"data"), content.get(labels_key)
            if (
                not isinstance(x, np.ndarray)
                or x.dtype != np.uint8
                or x.ndim != 2
                or x.shape[1] != 3072
                or not isinstance(y, list)
            ):
                raise _damaged(name, path, f"data must be bytes of shape (n, 3072) and {labels_key.decode()} a list")
            part = _images(name, path, torch.from_numpy(x.copy()).view(-1, 3, 32, 32), torch.tensor(y, dtype=torch.int64))
            pictures.append(part.images)
            labels.append(part.labels)
        return Images(images=torch.cat(pictures), labels=torch.cat(labels))

    names = _read_pickle(name, meta).get(names_key)
    if not isinstance(names, list) or not all(isinstance(n, bytes) for n in names):
        raise _damaged(name, meta, f"{names_key.decode()} must be a list of names")
    classes = tuple(n.decode() for n in names)
    return ImageData(name=name, train=read(train), test=read([test]), classes=classes, mirror=True)


class _ArraysOnly(pickle.Unpickler):
    """Admits what CIFAR's files are made of (arrays, bytes, text, numbers, lists, dicts) and nothing that could run code."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"),
        ("numpy", "dtype"), ("_codecs", "encode"),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no file of this set holds; it was not loaded")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_pickle(name: str, path: Path) -> dict:
    try:
        content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise _damaged(name, path, error) from error
    if not isinstance(content, dict):
        raise _damaged(name, path, f"a dictionary was expected, got {type(content).__name__}")
    return content


def _tiny_imagenet(root: Path) -> ImageData:
    wnids = _find(root, "tiny-imagenet", "wnids.txt", "tiny-imagenet-200")
    base, names = wnids.parent, wnids.read_text().split()
    number = {n: i for i, n in enumerate(names)}
    train = [(p, i) for n, i in number.items() for p in sorted((base / "train" / n / "images").glob("*.JPEG"))]
    empty = [n for n, i in number.items() if not any((base / "train" / n / "images").glob("*.JPEG"))]
    if empty:
        raise _damaged("tiny-imagenet", base / "train", f"no pictures of {empty[:4]} in train/{empty[0]}/images")
    annotations = _find(base, "tiny-imagenet", "val_annotations.txt", "val")
    test = []
    for line in annotations.read_text().splitlines():
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in number:
            raise _damaged("tiny-imagenet", annotations, f"a line without a known class: {line[:60]!r}")
        test.append((base / "val" / "images" / fields[0], number[fields[1]]))
    parts = [_read_pictures(rows) for rows in (train, test)]
    return ImageData(name="tiny-imagenet", train=parts[0], test=parts[1], classes=tuple(names), mirror=True)


def _read_pictures(rows: Sequence[tuple[Path, int]]) -> Images:
    from PIL import Image

    pictures = torch.empty(len(rows), 3, 64, 64, dtype=torch.uint8)
    for i, (path, _) in enumerate(rows):
        try:
            with Image.open(path) as picture:
                array = np.array(picture.convert("RGB"))
        except OSError as error:  # missing, truncated, or no picture
            raise _damaged("tiny-imagenet", path, error) from error
        if array.shape != (64, 64, 3):
            raise _damaged("tiny-imagenet", path, f"64x64 pixels were expected, got {array.shape[1]}x{array.shape[0]}")
        pictures[i] = torch.from_numpy(array).permute(2, 0, 1)
    return Images(images=pictures, labels=torch.tensor([label for _, label in rows]))


def _images(name: str, path: Path, images: Tensor, labels: Tensor) -> Images:
    if len(images) != len(labels):
        raise _damaged(name, path, f"{len(images)} pictures and {len(labels)} labels")
    return Images(images=images, labels=labels)


def _find(root: Path, name: str, file: str, folder: str = "") -> Path:
    """`file` in `root`, or in `folder` of it."""
    for path in (root / folder / file, root / file):
        if path.is_file():
            return path
    raise DataError(f"{name}: {root} has no {folder + '/' if folder else ''}{file}. Expected there: {LAYOUTS[name]}.")


def _damaged(name: str, path: Path, why: object) -> DataError:
    return DataError(f"{name}: {path} is damaged or truncated ({why}). Expected layout: {LAYOUTS[name]}.")
