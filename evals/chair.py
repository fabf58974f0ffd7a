"""CHAIR: which objects does a caption name that are not in the picture? Captions in, percentages
with error bars out.

POPE asks about objects one by one; CHAIR evaluates the objects that a model names by itself. A
model that names nothing hallucinates nothing, so recall and mentions per caption are reported too:
low CHAIR with low recall means silence.

Source: arXiv 1809.02156, section 2.1, and utils/chair.py of the authors' repository
(LisaAnne/Hallucination). An object counts each time it is named.

Differs from the paper: words are found with a list of names, synonyms and plurals, the longest
first ("hot dog" is not a dog). The authors reduce every word to its singular and join a fixed list
of word pairs; "baby bird" is a person and a bird here, unless the list of synonyms contains it.
Recall is not in the paper.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import TypeAdapter, ValidationError

from hipp_ext.errors import DataError
from hipp_ext.evals.statistics import rates_with_errors, ratio
from hipp_ext.files.untrusted import read_plain

_MAX_BYTES = 1 << 24  # size of a list of synonyms
_WORD = re.compile(r"[^\W_]+")
_IRREGULAR = {"man": "men", "woman": "women", "child": "children", "person": "people persons"}
_IRREGULAR |= {"mouse": "mice", "goose": "geese", "foot": "feet", "tooth": "teeth", "ox": "oxen"}
_IRREGULAR |= {"knife": "knives", "leaf": "leaves", "loaf": "loaves", "shelf": "shelves"}
_IRREGULAR |= {"scarf": "scarves scarfs", "wolf": "wolves", "calf": "calves", "bus": "buses busses"}
_IRREGULAR |= {"sheep": "sheep", "fish": "fish fishes", "deer": "deer", "aircraft": "aircraft"}
_IRREGULAR |= {"broccoli": "broccoli", "skis": "skis", "scissors": "scissors"}
_ES_AFTER_O = ("potato", "tomato", "mango", "hero")


def plurals(name: str) -> tuple[str, ...]:
    """The English plurals of an object's name. In several words the last one changes, as in "hot
    dogs".
    """
    before, _, last = name.rpartition(" ")
    if last in _IRREGULAR:
        forms = tuple(_IRREGULAR[last].split())
    elif re.search(r"[^aeiou]y$", last):
        forms = (last[:-1] + "ies",)
    elif re.search(r"(s|x|z|ch|sh)$", last) or last in _ES_AFTER_O:
        forms = (last + "es",)
    else:
        forms = (last + "s",)
    return tuple(f"{before} {form}".strip() for form in forms)


def default_synonyms(names: Collection[str]) -> dict[str, list[str]]:
    """Every object with its own name only: what CHAIR uses if no list of synonyms is given."""
    return {name: [] for name in names}


def read_synonyms(path: str | Path) -> dict[str, list[str]]:
    """The other names of each object, from JSON ({"person": ["girl", "boy"]}) or lines ("person,
    girl, boy").

    The lines are the format of the authors' synonyms.txt.

    Raises:
        DataError: the file does not exist, is empty, or has another format.
    """
    data = read_plain(path, _MAX_BYTES)
    try:
        if Path(path).suffix == ".json":
            found = TypeAdapter(dict[str, list[str]]).validate_json(data, strict=True)
        else:
            text = data.decode("utf-8")
            lines = [
                [word.strip() for word in line.split(",") if word.strip()]
                for line in text.splitlines()
            ]
            found = {words[0]: words[1:] for words in lines if words}
    except ValueError as error:  # pydantic's and decode's
        wrong = (
            error.errors(include_input=False)[0]["msg"]
            if isinstance(error, ValidationError)
            else error
        )
        raise DataError(
            f"{path} is not a list of synonyms: {wrong}. JSON is {{name: [words]}}"
        ) from None
    if not found:
        raise DataError(f"{path} holds no synonyms")
    return found


class ObjectWords:
    """Finds the objects that a text names.

    Args:
        synonyms: other names of each object. The object's own name and all plurals are found as
            well.

    Raises:
        DataError: there is no object, a name has no letter, or one word names two objects.
    """

    def __init__(self, synonyms: Mapping[str, Collection[str]]):
        if not synonyms:
            raise DataError("CHAIR needs the names of the objects to look for; none were given")
        self.names = tuple(synonyms)
        self._objects: dict[tuple[str, ...], str] = {}
        given = [(word, name) for name, others in synonyms.items() for word in (name, *others)]
        for word, name in given:
            if self._objects.setdefault(_words(word), name) != name:
                raise DataError(
                    f"the word {word!r} names two objects, {self._objects[_words(word)]!r} and "
                    f"{name!r}"
                )
        if () in self._objects:
            raise DataError(f"the object {self._objects[()]!r} has a name without a letter")
        for word, name in given:
            for form in plurals(word.lower()):
                # Given names have priority over plurals.
                self._objects.setdefault(_words(form), name)
        self._longest = max(map(len, self._objects))

    def __call__(self, text: str) -> list[str]:
        """The objects that are named, in the order of the text, each once per mention."""
        words, found, place = _words(text), [], 0
        while place < len(words):
            for length in range(min(self._longest, len(words) - place), 0, -1):
                name = self._objects.get(words[place : place + length])
                if name is not None:
                    found.append(name)
                    break
            else:
                length = 1
            place += length
        return found


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


@dataclass(frozen=True, kw_only=True)
class ChairScores:
    """CHAIR of one model. Rates and their standard errors (`_se`, over images) are percentages, [0,
    100].

    Attributes:
        n: number of captions.
        images: number of distinct images.
        chair_i: share of mentions whose object is not in the image. Lower is better; 0 without
            mentions.
        chair_s: share of captions with such a mention. Lower is better.
        recall: share of the objects in the images that their captions name. Higher is better; 0
            without objects.
        silent: share of captions that name no object.
        mentions: number of objects named per caption (not a percentage).
    """

    n: int
    images: int
    chair_i: float
    chair_i_se: float
    chair_s: float
    chair_s_se: float
    recall: float
    recall_se: float
    silent: float
    silent_se: float
    mentions: float
    mentions_se: float


class CaptionCounts(NamedTuple):
    """What one caption adds to the scores.

    Attributes:
        named: number of objects that it names, each as often as it is named.
        wrong: number of those that are not in the image.
        found: number of distinct objects of the image that it names.
        there: number of distinct objects in the image.
    """

    named: int
    wrong: int
    found: int
    there: int


def caption_counts(caption: str, there: Collection[str], words: ObjectWords) -> CaptionCounts:
    """The counts of a caption of an image with the objects `there`."""
    named, objects = words(caption), set(there)
    return CaptionCounts(
        named=len(named),
        wrong=sum(name not in objects for name in named),
        found=len(set(named) & objects),
        there=len(objects),
    )


_RATES = ("chair_i", "chair_s", "recall", "silent", "mentions")


def chair_scores(
    captions: Sequence[str],
    objects: Sequence[Collection[str]],
    images: Sequence[str],
    words: ObjectWords,
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> ChairScores:
    """Scores of captions.

    Args:
        captions: captions by the model.
        objects: objects in the image of each caption, by the names that `words` returns.
        images: any text that identifies the image of each caption.
        words: finds the objects that a text names.
        seed: random seed of the bootstrap over images, which gives the standard errors.
        resamples: number of bootstrap resamples.

    Raises:
        DataError: the sequences differ in length or are empty, or `words` does not know an object,
            so that no caption could name it.
    """
    if not len(captions) == len(objects) == len(images) > 0:
        lengths = [len(captions), len(objects), len(images)]
        raise DataError(
            f"CHAIR needs captions, objects and images of one length, above 0; got {lengths}"
        )
    if unknown := sorted(set().union(*objects) - set(words.names)):
        raise DataError(
            f"the images contain objects that the list of names does not have: "
            f"{', '.join(unknown[:5])}"
        )
    own = [caption_counts(*row, words) for row in zip(captions, objects, strict=True)]
    rows = [(1, c.named, c.wrong, c.wrong > 0, c.found, c.there, not c.named) for c in own]
    counts = np.asarray(rows, dtype=float)
    rates = rates_with_errors(counts, images, _RATES, _rates, seed=seed, resamples=resamples)
    return ChairScores(n=len(captions), images=len(set(images)), **rates)


def _rates(sums: np.ndarray) -> np.ndarray:
    """Sums of the rows of `chair_scores`, shape (..., 7), to the rates in the order of `_RATES`,
    shape (..., 5).
    """
    n, mentions, wrong, with_wrong, found, there, silent = np.moveaxis(
        np.asarray(sums, dtype=float), -1, 0
    )
    shares = ((wrong, mentions), (with_wrong, n), (found, there), (silent, n))
    percent = [100 * ratio(part, whole) for part, whole in shares]
    return np.stack([*percent, ratio(mentions, n)], axis=-1)
