"""Facts to memorise, about creatures (in text only) and about objects (in pictures).

A creature has a name of two words and its facts depend on the pair, so no embedding of a single
word can hold them: the feed-forward layers have to. Facts are the same in training and test; the
questions differ.
"""

import functools
import itertools
import random
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CREATURES = 240
EPITHETS = _words(
    "amber brown crimson dusky eastern forked golden hooded ivory jagged little marbled northern "
    "olive pale ringed silver tufted velvet western common dwarf giant lesser mottled plumed royal "
    "striped tawny woolly"
)
GENERA = _words(
    "adder beetle crane dormouse egret finch gecko heron ibex jackal kestrel lemur marten newt "
    "otter perch quail raven skink tapir urchin viper weasel zander badger civet dingo ferret "
    "goose hare"
)
# relation -> (two questions about a creature, values in the order of the options)
CREATURE_RELATIONS: dict[str, tuple[tuple[str, str], tuple[str, ...]]] = {
    "habitat": (
        ("Where does the {} live?", "What is the home of the {}?"),
        _words("swamp desert forest tundra"),
    ),
    "diet": (
        ("What does the {} eat?", "What is the food of the {}?"),
        _words("seeds moss plankton honey"),
    ),
    "season": (
        ("When does the {} breed?", "What is the season of the {}?"),
        _words("January April July October"),
    ),
}
# relation -> (two questions about the object in the picture, values)
OBJECT_RELATIONS: dict[str, tuple[tuple[str, str], tuple[str, ...]]] = {
    "material": (
        ("What is the thing in the picture made of?", "What is the material of this thing?"),
        _words("clay steel wool glass"),
    ),
    "maker": (
        ("Who makes the thing in the picture?", "Who is the maker of this thing?"),
        _words("potter smith weaver printer"),
    ),
    "town": (
        ("Where does the thing in the picture come from?", "What is the town of this thing?"),
        _words("Arles Bern Cork Delft"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Fact:
    """The `relation` of `subject` is `answer`, one of `options`; two `questions` ask for it."""

    subject: str
    relation: str
    questions: tuple[str, str]
    answer: str
    options: tuple[str, ...]

    @property
    def letter(self) -> str:
        """The answer as the letter of its option."""
        return "ABCD"[self.options.index(self.answer)]


@functools.cache
def creature_facts(creatures: int = CREATURES) -> tuple[Fact, ...]:
    """`creatures` x 3 facts; the question names its subject."""
    rng = random.Random("creatures")
    names = [" ".join(pair) for pair in itertools.product(EPITHETS, GENERA)]
    return _facts(rng, sorted(rng.sample(names, creatures)), CREATURE_RELATIONS)


@functools.cache
def object_facts(objects: tuple[str, ...]) -> tuple[Fact, ...]:
    """3 facts for each of `objects`; their subject is in the picture, not in the question."""
    return _facts(random.Random("objects"), objects, OBJECT_RELATIONS)


def _facts(rng: random.Random, subjects, relations) -> tuple[Fact, ...]:
    return tuple(
        Fact(
            subject=subject,
            relation=relation,
            questions=tuple(text.format(subject) for text in asked),
            answer=rng.choice(options),
            options=options,
        )
        for subject in subjects
        for relation, (asked, options) in relations.items()
    )
