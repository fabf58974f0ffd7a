"""Which drawings of a concept are for training, and which are kept for validation and test.

For each concept one artist's drawings are the test's and another's the validation's: what is asked
there was never seen, in a hand that is known from other concepts.
"""

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from hipp_ext.errors import DataError
from hipp_ext.evals.studies.smolworld import packages
from hipp_ext.evals.studies.smolworld.concepts import CLASSES, CONCEPTS, Concept, label_of
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
ASKED = 100  # concepts that are asked about
assert set(PART_OF) == {"train", *SPLITS}


@dataclass(frozen=True, kw_only=True)
class Drawings:
    """The concepts of a world, and the styles that each is drawn in.

    Attributes:
        styles: name of each concept -> its styles, of three artists at least.
        others: the same of things that nothing is asked about, for the training of the tower: what
            all artists draw teaches what drawings of one thing have in common.
    """

    styles: Mapping[str, tuple[str, ...]]
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, styles in self.styles.items():
            if len({packages.STYLES[style] for style in styles}) < len(PARTS):
                raise DataError(f"{name} is drawn by fewer than three artists: {styles}.")

    @property
    def names(self) -> tuple[str, ...]:
        """The concepts, in the order of `CONCEPTS`."""
        return tuple(self.styles)

    @property
    def all_names(self) -> tuple[str, ...]:
        """What the tower learns to name: the concepts, and then the others."""
        return (*self.styles, *self.others)

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """The same with label and class."""
        return tuple(CONCEPTS[name] for name in self.styles)

    def of(self, name: str, part: Part) -> tuple[str, ...]:
        """The styles of a concept's drawings of a part; the parts share no artist.

        Things that nothing is asked about are for training alone, in all their styles.
        """
        return self.others[name] if name in self.others else self._by_part[name][part]

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
        concepts: number of concepts that are asked about, of all classes alike; None: `ASKED`. All
            other emoji of things are the `others`.

    Raises:
        DataError: the packages are not installed, or `concepts` is out of range.
    """
    if reason := packages.missing():
        raise DataError(reason)
    count = ASKED if concepts is None else concepts
    if not 1 <= count <= len(CONCEPTS):
        raise DataError(f"concepts={concepts!r}: a number from 1 to {len(CONCEPTS)} is needed.")
    styles = {name: _styles(name) for name in CONCEPTS}
    kept = set(_by_class(styles)[:count])
    labels = {packages.plain(concept.label) for concept in CONCEPTS.values()}
    more = {
        name: _styles(name)
        for name in packages.things()
        if packages.plain(name) not in labels and name not in CONCEPTS
    }
    return Drawings(
        styles={name: own for name, own in styles.items() if name in kept},
        others={n: own for n, own in (styles | more).items() if n not in kept and len(own) > 1},
    )


def _styles(name: str) -> tuple[str, ...]:
    plain = packages.plain(label_of(name))
    return tuple(style for style in packages.STYLES if plain in packages.drawings(style))


def _by_class(styles: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The concepts, so that the first n have all classes alike, and those that most artists draw.

    (Which is the first of equal ones follows from hashes.)
    """
    place = {}
    for kind in CLASSES:
        names = chosen((n for n in CONCEPTS if CONCEPTS[n].kind == kind), "concepts")
        names.sort(key=lambda name: -len(styles[name]))
        place |= {name: (rank + 0.5) / len(names) for rank, name in enumerate(names)}
    return sorted(CONCEPTS, key=lambda name: place[name])
