"""A picture world: scenes of small objects, in which some objects usually come together.

Five kinds of scene own overlapping sets of objects, so that "absent, but usually there" (POPE's adversarial negatives)
differs from "absent, but common" (popular) and from "absent" (random). A scene is data; `render` makes it a picture.
"""

import functools
import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

GRID, CELL = 5, 8  # cells per side, pixels per cell
SIZE = GRID * CELL  # pixels per side of a picture

KINDS: dict[str, tuple[str, ...]] = {
    "kitchen": ("cup", "plate", "spoon", "kettle", "lemon", "table", "chair", "clock"),
    "office": ("laptop", "pen", "book", "lamp", "chair", "clock", "table", "cup"),
    "street": ("car", "bus", "bicycle", "sign", "dog", "tree", "bird", "clock"),
    "garden": ("tree", "flower", "bird", "dog", "chair", "table", "ball", "lemon"),
    "beach": ("boat", "shell", "kite", "ball", "dog", "bird", "book", "sign"),
}
KIND_WEIGHTS = (0.3, 0.25, 0.2, 0.15, 0.1)  # unequal, so that some objects are popular
OBJECTS: tuple[str, ...] = tuple(dict.fromkeys(name for names in KINDS.values() for name in names))
STRAY = 0.25  # probability that a scene also holds an object from anywhere

SHAPES = ("disc", "ring", "square", "frame", "up", "down", "cross", "bars")
COLOURS = ((200, 30, 30), (30, 60, 200), (20, 140, 40))

# The last digit of a layout's hash decides who may use it: splits cannot share a picture, however many are drawn.
SPLITS = ("calibration", "search", "validation", "test")
_OWNERS = ("train",) * 12 + SPLITS


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is where: `cells` holds (cell number, object) in order; `noise` seeds the position jitter and the grain."""

    kind: str
    cells: tuple[tuple[int, str], ...]
    noise: int

    @property
    def present(self) -> tuple[str, ...]:
        """Distinct objects in the order of `OBJECTS`."""
        names = {name for _, name in self.cells}
        return tuple(name for name in OBJECTS if name in names)

    @property
    def absent(self) -> tuple[str, ...]:
        """Objects that are not in the scene, in the order of `OBJECTS`."""
        present = self.present
        return tuple(name for name in OBJECTS if name not in present)


def owner(key: object) -> str:
    """Who may use `key` (anything with a stable repr): "train" or one of `SPLITS`, the same on every machine."""
    return _OWNERS[hashlib.sha256(repr(key).encode()).digest()[0] % len(_OWNERS)]


def draw_scene(rng: random.Random) -> Scene:
    """A scene: 3-5 different objects of one kind of place, now and then a stray one, each once or twice."""
    kind = rng.choices(tuple(KINDS), KIND_WEIGHTS)[0]
    names = rng.sample(KINDS[kind], rng.randint(3, 5))
    if rng.random() < STRAY:
        names.append(rng.choice([name for name in OBJECTS if name not in names]))
    copies = [name for name in names for _ in range(1 + (rng.random() < 0.2))]
    return _place(rng, kind, copies)


def draw_specimen(rng: random.Random, name: str | None = None) -> Scene:
    """A scene with 2-4 copies of one object (`name`, or any): the picture of a question about that object."""
    return _place(rng, "specimen", [name or rng.choice(OBJECTS)] * rng.randint(2, 4))


def _place(rng: random.Random, kind: str, names: list[str]) -> Scene:
    spots = rng.sample(range(GRID * GRID), len(names))
    return Scene(
        kind=kind, cells=tuple(sorted(zip(spots, names, strict=True))), noise=rng.getrandbits(32)
    )


def stream(
    split: str, draw: Callable[[random.Random], Scene] = draw_scene, seed: int = 0
) -> Iterator[Scene]:
    """Endless different scenes of a split (or "train"), the same ones in the same order for the same seed."""
    rng, seen = random.Random(f"{split} {draw.__name__} {seed}"), set()
    while True:
        scene = draw(rng)
        if owner(scene.cells) == split and scene.cells not in seen:
            seen.add(scene.cells)
            yield scene


@functools.cache
def statistics(n: int = 3000) -> tuple[Counter, Counter]:
    """How many of `n` training scenes hold an object, and how many hold both objects of an (ordered) pair."""
    single, pair = Counter(), Counter()
    for scene in itertools.islice(stream("train"), n):
        single.update(scene.present)
        pair.update(itertools.permutations(scene.present, 2))
    return single, pair


def popular(scene: Scene) -> list[str]:
    """Absent objects, those in the most training scenes first."""
    single, _ = statistics()
    return sorted(scene.absent, key=lambda name: -single[name])


def adversarial(scene: Scene) -> list[str]:
    """Absent objects, those that most often accompany the ones present first."""
    _, pair = statistics()
    return sorted(scene.absent, key=lambda name: -sum(pair[name, other] for other in scene.present))


@functools.cache
def sprite(name: str) -> np.ndarray:
    """The drawing of an object: [7, 7, 4] uint8 RGBA."""
    number = OBJECTS.index(name)
    shape, colour = SHAPES[number % len(SHAPES)], (*COLOURS[number // len(SHAPES)], 255)
    image = Image.new("RGBA", (CELL - 1, CELL - 1))
    pen = ImageDraw.Draw(image)
    match shape:
        case "disc":
            pen.ellipse((0, 0, 6, 6), fill=colour)
        case "ring":
            pen.ellipse((0, 0, 6, 6), outline=colour, width=2)
        case "square":
            pen.rectangle((1, 1, 5, 5), fill=colour)
        case "frame":
            pen.rectangle((0, 0, 6, 6), outline=colour)
        case "up":
            pen.polygon(((3, 0), (6, 6), (0, 6)), fill=colour)
        case "down":
            pen.polygon(((0, 0), (6, 0), (3, 6)), fill=colour)
        case "cross":
            pen.line((0, 0, 6, 6), fill=colour, width=2)
            pen.line((0, 6, 6, 0), fill=colour, width=2)
        case "bars":
            for x in (0, 3, 6):
                pen.line((x, 0, x, 6), fill=colour)
    return np.asarray(image)


def pixels(scene: Scene) -> np.ndarray:
    """The picture as [40, 40, 3] uint8: light paper, grain, each object somewhere in its cell."""
    rng = np.random.default_rng(scene.noise)
    canvas = np.full((SIZE, SIZE, 3), 225.0) + rng.normal(0, 12, (SIZE, SIZE, 3))
    for cell, name in scene.cells:
        top, left = (np.array(divmod(cell, GRID)) * CELL) + rng.integers(0, 2, 2)
        drawing = sprite(name)
        inside = drawing[..., 3] > 0
        canvas[top : top + CELL - 1, left : left + CELL - 1][inside] += (
            drawing[inside][:, :3] - 225.0
        )
    return canvas.clip(0, 255).astype(np.uint8)


def render(scene: Scene) -> Image.Image:
    """The picture of a scene: 40 x 40 px, RGB."""
    return Image.fromarray(pixels(scene))


def blank() -> Image.Image:
    """The empty paper that goes with a question that needs no picture."""
    return Image.new("RGB", (SIZE, SIZE), (225, 225, 225))
