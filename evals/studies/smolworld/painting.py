"""Pictures of scenes, with a map of what is visible where."""

import random

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageOps

from hipp_ext.evals.studies.smolworld import packages
from hipp_ext.evals.studies.smolworld.concepts import label_of
from hipp_ext.evals.studies.smolworld.scenes import MOST, SIZE, Scene, Thing

PATCH = 16  # pixels per side of a patch of the vision tower
SIDE = SIZE // PATCH
SEEN = 0.2  # least share of a patch that a thing covers to be named there
BLANK = (196, 196, 196)


def paint(scene: Scene | None, *, changed: bool = False) -> Image.Image:
    """The picture of a scene, 96 x 96 px RGB; None: the blank picture. See `painted`."""
    if scene is None:
        return Image.new("RGB", (SIZE, SIZE), BLANK)
    return painted(scene, changed=changed)[0]


def painted(
    scene: Scene, *, changed: bool = False
) -> tuple[Image.Image, UInt8[np.ndarray, "96 96"]]:
    """(picture, number of the thing that is visible at each pixel, from 1, or 0).

    With `changed`, shapes and colours of the drawings are changed at random, as if more artists had
    drawn them.
    """
    rng = random.Random(scene.ground)
    artist = random.Random(scene.ground + 1) if changed else None
    picture, visible = _ground(rng), Image.new("L", (SIZE, SIZE))
    for number, thing in enumerate(scene.things, 1):
        drawing = _drawing(thing, artist)
        x, y = thing.x - drawing.width // 2, thing.y - drawing.height // 2
        picture.paste(drawing, (x, y), drawing)
        box = (x, y, x + drawing.width, y + drawing.height)
        visible.paste(number, box, packages.solid(drawing, 127))
    grain = np.random.default_rng(scene.ground).normal(0, rng.uniform(1, 6), (SIZE, SIZE, 1))
    pixels = np.asarray(picture) * rng.uniform(0.75, 1.1) + grain
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), np.asarray(visible)


def patch_things(visible: UInt8[np.ndarray, "96 96"]) -> UInt8[np.ndarray, " patches"]:
    """For each patch, row by row, the thing that covers most of it; 0 if none covers enough."""
    patches = visible.reshape(SIDE, PATCH, SIDE, PATCH).transpose(0, 2, 1, 3).reshape(SIDE**2, -1)
    shares = np.stack([(patches == n).mean(1) for n in range(1, MOST + 1)], 1)
    return np.where(shares.max(1) >= SEEN, 1 + shares.argmax(1), 0).astype(np.uint8)


def _drawing(thing: Thing, artist: random.Random | None) -> Image.Image:
    whole = packages.raster(thing.style, label_of(thing.name))
    drawing = ImageOps.contain(whole, (thing.size, thing.size), Image.Resampling.BILINEAR)
    if artist:
        drawing = _recoloured(_stretched(drawing, artist), artist)
    if thing.mirrored:
        drawing = ImageOps.mirror(drawing)
    return drawing.rotate(thing.angle, Image.Resampling.BILINEAR, expand=True)


def _stretched(drawing: Image.Image, rng: random.Random) -> Image.Image:
    """The drawing with another ratio of height to width along some axis."""
    axis, narrow = rng.uniform(-90, 90), rng.uniform(0.65, 1)
    turned = drawing.rotate(axis, Image.Resampling.BILINEAR, expand=True)
    smaller = turned.resize((max(1, round(turned.width * narrow)), turned.height))
    back = smaller.rotate(-axis, Image.Resampling.BILINEAR, expand=True)
    return back.crop(back.getbbox())


def _recoloured(drawing: Image.Image, rng: random.Random) -> Image.Image:
    pixels = np.asarray(drawing).astype(np.float32)
    grey = pixels[..., :3].mean(-1, keepdims=True)
    gains = [rng.uniform(0.75, 1.25) for _ in range(3)]
    colours = (grey + rng.uniform(0.1, 1.4) * (pixels[..., :3] - grey)) * gains
    pixels[..., :3] = (colours + rng.uniform(-30, 30)).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def _ground(rng: random.Random) -> Image.Image:
    """A gradient with up to eight shapes of similar colours, and without names."""
    first, last = (tuple(rng.randint(60, 240) for _ in range(3)) for _ in range(2))
    ramp = Image.linear_gradient("L").resize((SIZE, SIZE)).rotate(rng.choice((0, 90, 180, 270)))
    ground = ImageOps.colorize(ramp, first, last)
    pen = ImageDraw.Draw(ground)
    for _ in range(rng.randint(0, 8)):
        mixed = rng.random()
        colour = tuple(
            min(255, max(0, round(a + mixed * (b - a)) + rng.randint(-35, 35)))
            for a, b in zip(first, last, strict=True)
        )
        x, y = rng.randint(-20, SIZE), rng.randint(-20, SIZE)
        box = (x, y, x + rng.randint(6, 60), y + rng.randint(6, 60))
        match rng.randrange(4):
            case 0:
                pen.ellipse(box, fill=colour)
            case 1:
                pen.rectangle(box, fill=colour)
            case 2:
                pen.line(box, fill=colour, width=rng.randint(1, 6))
            case _:
                pen.polygon([(box[0], box[3]), (box[2], box[3]), (x + 20, box[1])], fill=colour)
    return ground
