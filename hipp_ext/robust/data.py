"""Images with labels, checked."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from hipp_ext.errors import DataError

TOLERANCE = 1e-4  # the same as that of attacks


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """Images with their classes.

    Attributes:
        images: (rows, channels, height, width), bytes, or float32 in [0, 1]. Values that lie
            outside by a rounding error, as after a normalisation was undone, are clamped.
        labels: (rows,) int64.
    """

    images: Tensor
    labels: Int[Tensor, " rows"]

    def __post_init__(self) -> None:
        x = self.images
        if x.is_floating_point() and x.numel():
            low, high = (float(v) for v in x.aminmax())
            if (low < 0 or high > 1) and low >= -TOLERANCE and high <= 1 + TOLERANCE:
                object.__setattr__(self, "images", x.clamp(0, 1))

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

    Attributes:
        name: name of the set.
        train: training images.
        test: test images.
        classes: names of the classes, in the order of the labels.
        mirror: whether a mirrored image belongs to the same class.
        pad: pixels of the random shift in training.

    Raises:
        DataError: images outside [0, 1], labels outside the classes, or rows and labels that do not
            match.
    """

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    mirror: bool = False
    pad: int = 4

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
            f"{what}: images of shape (rows, channels, height, width) are needed; got "
            f"{tuple(x.shape)}, {len(y)} labels."
        )
    if x.dtype != torch.uint8:
        if not x.is_floating_point():
            raise DataError(
                f"{what}: images must be bytes or floating point in [0, 1], got {x.dtype}."
            )
        if not bool(((x >= 0) & (x <= 1)).all()):
            raise DataError(
                f"{what}: images must lie in [0, 1], got {float(x.min()):.4g} to "
                f"{float(x.max()):.4g}. Pass them as they are before normalisation, and put the "
                "normalisation into the model: epsilon is measured in these units."
            )
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise DataError(
            f"{what}: labels must be 0 to {classes - 1} for {classes} classes, got "
            f"{int(y.min())} to {int(y.max())}."
        )
