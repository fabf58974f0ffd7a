"""A picture world: scenes of small objects, in which some objects often occur together.

Five kinds of scenes have overlapping sets of objects, so that POPE's adversarial negatives (absent,
but usual in such a scene) differ from popular ones (absent, but common) and from random ones. A
scene is data; `render` makes a picture of it.
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
STRAY = 0.25  # probability of an additional object of any kind

SHAPES = ("disc", "ring", "square", "frame", "up", "down", "cross", "bars")
COLOURS = ((200, 30, 30), (30, 60, 200), (20, 140, 40))

# The hash of a layout decides its split, so that splits never share a picture.
SPLITS = ("calibration", "search", "validation", "test")
_OWNERS = ("train",) * 12 + SPLITS


@dataclass(frozen=True, kw_only=True)
class Scene:
    """`cells` has pairs (cell number, object); `noise` seeds position jitter and grain."""

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
    """The split of `key` (any object with a stable repr): "train" or one of `SPLITS`."""
    return _OWNERS[hashlib.sha256(repr(key).encode()).digest()[0] % len(_OWNERS)]


def draw_scene(rng: random.Random) -> Scene:
    """A scene of 3-5 objects of one kind and sometimes a stray one, each once or twice."""
    kind = rng.choices(tuple(KINDS), KIND_WEIGHTS)[0]
    names = rng.sample(KINDS[kind], rng.randint(3, 5))
    if rng.random() < STRAY:
        names.append(rng.choice([name for name in OBJECTS if name not in names]))
    copies = [name for name in names for _ in range(1 + (rng.random() < 0.2))]
    return _place(rng, kind, copies)


def draw_specimen(rng: random.Random, name: str | None = None) -> Scene:
    """A scene with 2-4 copies of one object, `name` or a random one, for questions about it."""
    return _place(rng, "specimen", [name or rng.choice(OBJECTS)] * rng.randint(2, 4))


def _place(rng: random.Random, kind: str, names: list[str]) -> Scene:
    spots = rng.sample(range(GRID * GRID), len(names))
    return Scene(
        kind=kind, cells=tuple(sorted(zip(spots, names, strict=True))), noise=rng.getrandbits(32)
    )


def stream(
    split: str, draw: Callable[[random.Random], Scene] = draw_scene, seed: int = 0
) -> Iterator[Scene]:
    """Endless different scenes of a split or of "train", equal for equal seeds."""
    rng, seen = random.Random(f"{split} {draw.__name__} {seed}"), set()
    while True:
        scene = draw(rng)
        if owner(scene.cells) == split and scene.cells not in seen:
            seen.add(scene.cells)
            yield scene


@functools.cache
def statistics(n: int = 3000) -> tuple[Counter, Counter]:
    """(count by object, count by ordered pair of objects) in `n` training scenes."""
    single, pair = Counter(), Counter()
    for scene in itertools.islice(stream("train"), n):
        single.update(scene.present)
        pair.update(itertools.permutations(scene.present, 2))
    return single, pair


def popular(scene: Scene) -> list[str]:
    """Absent objects, the most frequent in training scenes first."""
    single, _ = statistics()
    return sorted(scene.absent, key=lambda name: -single[name])


def adversarial(scene: Scene) -> list[str]:
    """Absent objects, those that most often occur with the present ones first."""
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
    """The picture as [40, 40, 3] uint8: light paper with grain, each object within its cell."""
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
    """The blank picture of a question that needs none."""
    return Image.new("RGB", (SIZE, SIZE), (225, 225, 225))
