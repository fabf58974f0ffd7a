"""Image sets: scikit-learn's digits, and CIFAR, SVHN and Tiny-ImageNet from local folders.

Nothing is downloaded. The local folders are read through torchvision.datasets.

The files of CIFAR are pickles, and those of SVHN are read by scipy. torchvision opens them only if
their MD5 digests are those of the published files, so a file that is anything else is refused
before it is read. The pictures of Tiny-ImageNet may be any, and are decoded as untrusted ones.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hipp_ext.errors import DataError, MissingExtraError
from hipp_ext.files.untrusted import read_picture, read_plain, shown
from hipp_ext.robust.data import ImageData, Images

LAYOUTS = {
    "svhn": "train_32x32.mat and test_32x32.mat (format 2, unchanged, "
    "http://ufldl.stanford.edu/housenumbers)",
    "cifar10": "cifar-10-batches-py/ with data_batch_1 to data_batch_5, test_batch and "
    "batches.meta (the Python version, unchanged)",
    "cifar100": "cifar-100-python/ with train, test and meta (the Python version, unchanged)",
    "tiny-imagenet": "tiny-imagenet-200/ with train/<wnid>/images/*.JPEG, val/images/*.JPEG and "
    "val/val_annotations.txt",
}
SIDE = 64  # pixels of a picture of Tiny-ImageNet
TEXT_BYTES = 16 << 20


def cifar(name: str, root: Path) -> ImageData:
    """CIFAR-10 or CIFAR-100, the latter with its fine labels."""
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if name == "cifar10" else CIFAR100
    parent = root.parent if root.name == kind.base_folder else root
    parts = []
    for train in (True, False):
        part = _open(name, root, kind, parent, train)
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        parts.append(Images(images=images, labels=torch.tensor(part.targets)))
    classes = tuple(part.classes)
    return ImageData(name=name, train=parts[0], test=parts[1], classes=classes, mirror=True)


def svhn(name: str, root: Path) -> ImageData:
    """Street View House Numbers, format 2."""
    from torchvision.datasets import SVHN

    parts = []
    for split in ("train", "test"):
        part = _open(name, root, SVHN, root, split)
        images = torch.from_numpy(np.ascontiguousarray(part.data))
        parts.append(Images(images=images, labels=torch.from_numpy(part.labels)))
    return ImageData(name=name, train=parts[0], test=parts[1], classes=tuple("0123456789"))


def _open(name: str, root: Path, kind: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return kind(*arguments)
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), "robust") from None
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{name}: files in {root} are missing, or they are not the published ones. Expected "
            f"there: {LAYOUTS[name]}."
        ) from error


def tiny_imagenet(name: str, root: Path) -> ImageData:
    """Tiny-ImageNet as it is unpacked; its validation pictures are the test set."""
    from torchvision.datasets import ImageFolder

    base = root / "tiny-imagenet-200"
    base = base if base.is_dir() else root
    try:
        train = ImageFolder(base / "train")
        annotations = base / "val" / "val_annotations.txt"
        lines = read_plain(annotations, TEXT_BYTES, "list").decode().splitlines()
        test = [_annotated(line, train.class_to_idx) for line in lines]
        validation = [(base / "val" / "images" / file, label) for file, label in test]
        parts = [_pictures(rows) for rows in (train.samples, validation)]
    except (OSError, ValueError) as error:  # DataError is one
        raise DataError(f"{name}: {error} Expected in {root}: {LAYOUTS[name]}.") from error
    classes = tuple(train.classes)
    return ImageData(name=name, train=parts[0], test=parts[1], classes=classes, mirror=True)


def _annotated(line: str, classes: dict[str, int]) -> tuple[str, int]:
    """(file name, label) of a line of val_annotations.txt."""
    file, _, rest = line.partition("\t")
    label = classes.get(rest.partition("\t")[0])
    if label is None or Path(file).name != file or not file.isprintable():
        raise DataError(
            f"val_annotations.txt needs a file name and a class per line, got {shown(line, 60)!r}."
        )
    return file, label


def _pictures(rows: Sequence[tuple[str | Path, int]]) -> Images:
    images = torch.empty(len(rows), 3, SIDE, SIDE, dtype=torch.uint8)
    for i, (path, _) in enumerate(rows):
        picture = read_picture(path)
        if picture.size != (SIDE, SIDE):
            raise DataError(
                f"{shown(path)} has {picture.width}x{picture.height} pixels, and {SIDE}x{SIDE} are "
                "needed."
            )
        images[i] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return Images(images=images, labels=torch.tensor([label for _, label in rows]))


READERS: dict[str, Callable[[str, Path], ImageData]] = {
    "svhn": svhn,
    "cifar10": cifar,
    "cifar100": cifar,
    "tiny-imagenet": tiny_imagenet,
}


def load_data(name: str, root: str | Path | None = None, *, seed: int = 0) -> ImageData:
    """The set called `name`: digits (embedded), svhn, cifar10, cifar100 or tiny-imagenet.

    Args:
        name: name of the set.
        root: folder with the set's files in their published layout, or its parent; not needed for
            digits.
        seed: random seed of the digits' split into training and test images.

    Raises:
        DataError: an unknown name, or files that are missing or not the published ones; the message
            gives the expected layout.
        MissingExtraError: scikit-learn is not installed (digits).
    """
    if name == "digits":
        return _digits(seed)
    if name not in READERS:
        raise DataError(f"Known image sets are {', '.join(('digits', *LAYOUTS))}; got {name!r}.")
    if root is None or not Path(root).is_dir():
        raise DataError(
            f"{name} is read from a local folder, got {root}. Expected there: {LAYOUTS[name]}."
        )
    return READERS[name](name, Path(root))


def _digits(seed: int) -> ImageData:
    """1,797 digits of 8x8 pixels, scaled up to 16x16; 1,200, stratified by class, to train on."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError:
        raise MissingExtraError("scikit-learn", "robust") from None
    raw: Any = load_digits()
    images = torch.from_numpy(raw.images).float()[:, None] / 16
    images = torch.nn.functional.interpolate(images, size=(16, 16), mode="bilinear").clamp(0, 1)
    labels = torch.from_numpy(raw.target).long()
    split = train_test_split(
        np.arange(len(labels)), train_size=1200, stratify=raw.target, random_state=seed
    )
    parts = [Images(images=images[i].contiguous(), labels=labels[i]) for i in split]
    return ImageData(
        name="digits", train=parts[0], test=parts[1], classes=tuple("0123456789"), pad=2
    )
