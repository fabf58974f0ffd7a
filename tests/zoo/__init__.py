"""A tiny random model of every family that users may bring, from transformers' own classes."""

from typing import Any

from torch import nn

from zoo.family import Family
from zoo.grids import GRIDS
from zoo.language import LANGUAGE_MODELS
from zoo.others import OTHERS
from zoo.wrappers import WRAPPERS

FAMILIES: dict[str, Family] = WRAPPERS | GRIDS | OTHERS | LANGUAGE_MODELS


def build(name: str, seed: int = 0) -> nn.Module:
    """See `Family.build`."""
    return FAMILIES[name].build(seed)


def batch(name: str, rows: int = 2, length: int = 6, seed: int = 0) -> dict[str, Any]:
    """See `Family.batch`."""
    return FAMILIES[name].batch(rows, length, seed)
