"""A tiny image set that can be learned in a second, and a tiny network for it."""

import torch
from torch import nn

from hipp_ext.robust import ImageData, Images
from hipp_ext.robust.models import ConvStack

EPSILON = 0.1


def stripes(n: int = 96, classes: int = 4, seed: int = 0) -> Images:
    """8x8 pictures with one bright row, whose place (by pairs of rows) is the class, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    images = 0.4 * torch.rand(n, 1, 8, 8, generator=generator)
    images[torch.arange(n), 0, 2 * labels] += 0.6
    return Images(images=images.clamp(0, 1), labels=labels)


def data(classes: int = 4) -> ImageData:
    names = tuple(map(str, range(classes)))
    return ImageData(
        name="stripes",
        train=stripes(classes=classes),
        test=stripes(48, classes, 1),
        classes=names,
        pad=0,
    )


def network(classes: int = 4) -> nn.Module:
    """Three convolutions of 6, 8 and 10 channels."""
    torch.manual_seed(0)
    return Flat(classes)


class Flat(ConvStack):
    """Where the stripe is matters, so the last map is flattened."""

    def __init__(self, classes: int):
        super().__init__((6, 8, "M", 10), classes, 1)
        self.fc = nn.Linear(160, classes)

    def forward(self, x):
        return self.fc(self.features(x).flatten(1))
