"""Which drawings of a concept are for training, and which are kept for validation and test.

For each concept one artist's drawings are the test's and another's the validation's: what is asked
there was never seen, in a hand that is known from other concepts.
"""

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from hipp_ext.errors import DataError
from hipp_ext.evals.studies.smolworld import packages
from hipp_ext.evals.studies.smolworld.concepts import CONCEPTS, Concept
from hipp_ext.testbed import SPLITS

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
# Split of the questions -> the drawings that it shows.
PART_OF: Mapping[str, Part] = {
    "train": "train",
    "calibration": "train",
    "search": "validation",
    "validation": "validation",
    "test": "test",
}
assert set(PART_OF) == {"train", *SPLITS}


@dataclass(frozen=True, kw_only=True)
class Drawings:
    """The concepts of a world, and the styles that each is drawn in.

    Attributes:
        styles: name of each concept -> its styles, of three artists at least.
    """

    styles: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        for name, styles in self.styles.items():
            if len({packages.STYLES[style] for style in styles}) < len(PARTS):
                raise DataError(f"{name} is drawn by fewer than three artists: {styles}.")

    @property
    def names(self) -> tuple[str, ...]:
        """The concepts, in the order of `CONCEPTS`."""
        return tuple(self.styles)

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """The same with label and class."""
        return tuple(CONCEPTS[name] for name in self.styles)

    def of(self, name: str, part: Part) -> tuple[str, ...]:
        """The styles of a concept's drawings of a part; the parts share no artist."""
        return self._by_part[name][part]

    @functools.cached_property
    def _by_part(self) -> dict[str, dict[Part, tuple[str, ...]]]:
        return {name: _parts(name, styles) for name, styles in self.styles.items()}


def chosen(names: Iterable[str], key: str) -> list[str]:
    """The names in an order that follows from the key and from nothing else."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{key} {name}".encode()).digest())


def _parts(name: str, styles: tuple[str, ...]) -> dict[Part, tuple[str, ...]]:
    artists = chosen({packages.STYLES[style] for style in styles}, name)
    holders: dict[Part, list[str]] = {
        "test": artists[:1],
        "validation": artists[1:2],
        "train": artists[2:],
    }
    return {
        part: tuple(style for style in styles if packages.STYLES[style] in held)
        for part, held in holders.items()
    }


def read_drawings(concepts: int | None = None) -> Drawings:
    """The drawings of the packages.

    Args:
        concepts: number of concepts, for a smaller world; None: all.

    Raises:
        DataError: the packages are not installed, or `concepts` is out of range.
    """
    if reason := packages.missing():
        raise DataError(reason)
    count = len(CONCEPTS) if concepts is None else concepts
    if not 1 <= count <= len(CONCEPTS):
        raise DataError(f"concepts={concepts!r}: a number from 1 to {len(CONCEPTS)} is needed.")
    kept = set(chosen(CONCEPTS, "concepts")[:count])
    return Drawings(
        styles={
            name: tuple(
                style
                for style in packages.STYLES
                if packages.plain(concept.label) in packages.drawings(style)
            )
            for name, concept in CONCEPTS.items()
            if name in kept
        }
    )
