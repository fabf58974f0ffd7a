"""Scenes: which things a picture shows, and where; and what usually comes together.

A scene is data. The same seed gives the same scenes on every machine; `painting.py` makes pictures
of them.
"""

import functools
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hipp_ext.evals.studies.smolworld.concepts import KIND_WEIGHTS, KINDS
from hipp_ext.evals.studies.smolworld.drawings import PART_OF, Drawings, chosen, read_drawings
from hipp_ext.evals.studies.smolworld.facts import read_glosses
from hipp_ext.testbed.world import owner

SIZE = 96  # pixels per side of a picture
MOST = 6  # things
COUNT_WEIGHTS = (2, 2, 3, 3, 2, 2)  # scenes of 1, 2, ... things
STRAY = 0.12  # probability that a thing is of any class
SIZES = (72, 52, 43, 38, 34, 31)  # usual size of a thing among 1, 2, ... of them [px]
OVERLAP = 0.25  # most of a thing that others are meant to cover
TRIES = 30


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A concept in a picture.

    Attributes:
        name: the concept.
        style: the style of the drawing.
        x, y: its centre [px].
        size: its longer side before it is turned [px].
        angle: how far it is turned, against the clock [degrees].
        mirrored: whether left and right are exchanged.
    """

    name: str
    style: str
    x: int
    y: int
    size: int
    angle: int
    mirrored: bool


@dataclass(frozen=True, kw_only=True)
class Scene:
    """`things` are painted in their order; `ground` seeds the background."""

    kind: str
    things: tuple[Thing, ...]
    ground: int

    @property
    def present(self) -> tuple[str, ...]:
        """The names of the things, the largest first."""
        return tuple(t.name for t in sorted(self.things, key=lambda thing: -thing.size))


class World:
    """Scenes of some concepts.

    Args:
        drawings: the concepts and their drawings.
        glosses: what a dictionary says of concepts; see `facts.read_glosses`.
    """

    def __init__(self, drawings: Drawings, glosses: Mapping[str, str]):
        self.drawings, self.glosses = drawings, glosses
        self.kinds = {
            kind: {c: w for c, w in classes.items() if self._of_class(c)}
            for kind, classes in KINDS.items()
        }

    def _of_class(self, kind: str) -> list[str]:
        names = [c.name for c in self.drawings.concepts if c.kind == kind]
        return chosen(names, "frequency")

    @functools.cached_property
    def members(self) -> dict[str, tuple[list[str], list[float]]]:
        """Class -> its concepts and their weights; unequal, so that some are popular."""
        found = {}
        for kind in {c.kind for c in self.drawings.concepts}:
            names = self._of_class(kind)
            found[kind] = names, [1 / (6 + rank) for rank in range(len(names))]
        return found

    def draw_scene(self, rng: random.Random, split: str, count: int | None = None) -> Scene:
        """A scene of `count` different things of one kind of place, with a stray one at times."""
        kind = rng.choices(tuple(self.kinds), KIND_WEIGHTS)[0]
        classes = self.kinds[kind]
        count = count or rng.choices(range(1, MOST + 1), COUNT_WEIGHTS)[0]
        names: list[str] = []
        while len(names) < min(count, len(self.drawings.names)):
            if not classes or rng.random() < STRAY:
                name = rng.choice(self.drawings.names)
            else:
                own = rng.choices(tuple(classes), tuple(classes.values()))[0]
                name = rng.choices(*self.members[own])[0]
            if name not in names:
                names.append(name)
        return self._place(rng, split, kind, names)

    def draw_specimen(self, rng: random.Random, split: str) -> Scene:
        """A scene with one thing, all concepts being equally frequent."""
        return self.draw_mixture(rng, split, 1)

    def draw_mixture(self, rng: random.Random, split: str, count: int | None = None) -> Scene:
        """A scene of `count` things of no kind of place, all concepts being equally frequent."""
        return self._mixture(rng, split, self.drawings.names, count)

    def draw_others(self, rng: random.Random, split: str) -> Scene:
        """A scene of things that nothing is asked about."""
        return self._mixture(rng, split, tuple(self.drawings.others))

    def _mixture(
        self, rng: random.Random, split: str, names: Sequence[str], count: int | None = None
    ) -> Scene:
        count = count or rng.choices(range(1, MOST + 1), COUNT_WEIGHTS)[0]
        return self._place(rng, split, "mixture", rng.sample(names, count))

    def _place(self, rng: random.Random, split: str, kind: str, names: Sequence[str]) -> Scene:
        things: list[Thing] = []
        for name in names:
            size = round(SIZES[len(names) - 1] * rng.uniform(0.75, 1.2))
            spots = [_spot(rng, size) for _ in range(TRIES)]
            covers = [max((_covered(s, size, t) for t in things), default=0.0) for s in spots]
            fits = [s for s, covered in zip(spots, covers, strict=True) if covered <= OVERLAP]
            x, y = fits[0] if fits else spots[covers.index(min(covers))]
            style = rng.choice(self.drawings.of(name, PART_OF[split]))
            angle, mirrored = rng.randint(-25, 25), rng.random() < 0.5
            things.append(
                Thing(name=name, style=style, x=x, y=y, size=size, angle=angle, mirrored=mirrored)
            )
        return Scene(kind=kind, things=tuple(things), ground=rng.getrandbits(32))

    def nth(
        self, split: str, key: object, draw: Callable[[random.Random, str], Scene] | None = None
    ) -> Scene:
        """The scene of a split that belongs to `key`: equal keys, equal scenes.

        The background is drawn anew until the scene's hash belongs to the split.
        """
        rng = random.Random(f"{split} {key}")
        scene = (draw or self.draw_scene)(rng, split)
        while owner(scene) != split:
            scene = replace(scene, ground=rng.getrandbits(32))
        return scene

    def stream(self, split: str) -> Iterator[Scene]:
        """Endless scenes of a split or of "train"."""
        return (self.nth(split, f"scene {number}") for number in itertools.count())

    @functools.cached_property
    def statistics(self) -> tuple[Counter[str], Counter[tuple[str, str]]]:
        """(count by concept, count by ordered pair of concepts) in 4000 training scenes."""
        single, pair = Counter[str](), Counter[tuple[str, str]]()
        for scene in itertools.islice(self.stream("train"), 4000):
            single.update(scene.present)
            pair.update(itertools.permutations(scene.present, 2))
        return single, pair

    def absent(self, scene: Scene) -> list[str]:
        """Concepts that are not in the scene."""
        present = set(scene.present)
        return [name for name in self.drawings.names if name not in present]

    def popular(self, scene: Scene) -> list[str]:
        """Absent concepts, the most frequent in training scenes first."""
        single, _ = self.statistics
        return sorted(self.absent(scene), key=lambda name: -single[name])

    def accompanying(self, scene: Scene) -> list[str]:
        """Absent concepts, those that most often come together with the present ones first."""
        _, pair = self.statistics
        present = scene.present
        return sorted(
            self.absent(scene), key=lambda name: -sum(pair[name, other] for other in present)
        )


@functools.cache
def read_world(concepts: int | None = None) -> World:
    """The world of the packages; see `read_drawings`. The same one for equal arguments."""
    drawings = read_drawings(concepts)
    return World(drawings, read_glosses(drawings.names))


def _spot(rng: random.Random, size: int) -> tuple[int, int]:
    margin = round(0.45 * size)
    return rng.randint(margin, SIZE - margin), rng.randint(margin, SIZE - margin)


def _covered(spot: tuple[int, int], size: int, other: Thing) -> float:
    """How much of the smaller of two squares the other one covers, from 0 to 1."""
    reach = (size + other.size) / 2
    smaller = min(size, other.size)
    sides = [
        min(smaller, max(0.0, reach - abs(a - b)))
        for a, b in zip(spot, (other.x, other.y), strict=True)
    ]
    return sides[0] * sides[1] / smaller**2
