"""What a dictionary says of the concepts: WordNet's glosses."""

import re
from collections.abc import Iterable

from hipp_ext.evals.studies.smolworld import packages
from hipp_ext.evals.studies.smolworld.concepts import CONCEPTS, Concept

# Class -> the lexicographer's files that its senses are in; all others are artifacts (6).
# 5: animals, 8: body, 13: food, 17: natural objects, 19: phenomena, 20: plants, 25: shapes.
_FILES = {
    **dict.fromkeys(("mammal", "bird", "reptile or amphibian", "sea animal", "bug"), (5,)),
    **dict.fromkeys(("flower", "plant"), (20,)),
    **dict.fromkeys(("fruit", "vegetable"), (13, 20)),
    **dict.fromkeys(("meal", "sweet", "drink"), (13,)),
    "weather sign": (17, 19),
}
_LENGTHS = range(20, 111)  # characters of a gloss that is asked for
_PARTS = re.compile(r"^(?:pair|bunch|head|loaf|piece|stack|bowl|slice|portion|ball|spool|bar) of ")


def read_glosses(names: Iterable[str]) -> dict[str, str]:
    """Concept -> what WordNet says of it, without its name; concepts that it cannot ask for lack.

    The sense is the most frequent one of the kind that the class has: of "crane" the bird.
    """
    found = {name: _gloss(CONCEPTS[name]) for name in names}
    return {name: text for name, text in found.items() if text}


def _gloss(concept: Concept) -> str | None:
    for word in dict.fromkeys((concept.name, _PARTS.sub("", concept.name), concept.label)):
        for file, text in packages.senses(word):
            if file in _FILES.get(concept.kind, (6,)):
                return _cleaned(text, concept)
    return None


def _cleaned(text: str, concept: Concept) -> str | None:
    """The first part of a gloss, without remarks and examples; None: it gives the answer away."""
    first = re.sub(r"\([^)]*\)", "", re.split(r'[;:"]', text)[0])
    first = " ".join(first.split()).strip(" ,")
    named = {word for word in re.findall("[a-z]+", concept.name.lower()) if len(word) > 2}
    said = set(re.findall("[a-z]+", first.lower()))
    told = any(a.startswith(b) or b.startswith(a) for a in named for b in said if len(b) > 2)
    return None if told or len(first) not in _LENGTHS else first
