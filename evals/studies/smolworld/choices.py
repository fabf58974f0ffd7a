"""Multiple choice with four options: on classes and glosses, with and without a picture.

The options of one question are of different classes, or, where a name is asked for, things that
usually come together. So the class, or the place, seldom gives the answer away.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from hipp_ext.evals.studies.smolworld.concepts import CONCEPTS, with_article
from hipp_ext.evals.studies.smolworld.scenes import Scene, World
from hipp_ext.testbed.world import owner

OPTIONS = 4


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A question with its options; `answer` is the letter of the right one.

    Attributes:
        relation: what is asked for; begins with "picture" if the picture is needed.
        scene: what the picture shows; None: no picture is needed.
    """

    relation: str
    question: str
    options: tuple[str, ...]
    answer: str
    scene: Scene | None = None


def nth(world: World, split: str, key: object) -> Choice:
    """The question of a split, or of "train", that belongs to `key`."""
    rng = random.Random(f"choice {split} {key}")
    if rng.random() < 0.5:
        return _with_picture(world, rng, split)
    return without_picture(world, rng, split)


def _with_picture(world: World, rng: random.Random, split: str) -> Choice:
    """A question about a picture that is drawn for it, and so belongs to the split."""
    while True:
        make = rng.choice(_WITH_PICTURE)
        draw = world.draw_specimen if make in _OF_ONE else world.draw_scene
        if choice := make(world, rng, world.nth(split, rng.random(), draw)):
            return choice


def without_picture(world: World, rng: random.Random, split: str) -> Choice:
    """A question that needs no picture, and belongs to the split itself."""
    while True:
        choice = rng.choice(_WITHOUT_PICTURE)(world, rng)
        if choice and owner((choice.question, choice.options)) == split:
            return choice


def copied(world: World, rng: random.Random) -> Choice:
    """A question whose answer stands in it, for training: it teaches what letters stand for."""
    names = rng.sample(world.drawings.names, OPTIONS)
    return _ask(rng, "copy", f"Which of these is {with_article(names[0])}?", names[0], names[1:])


def about(world: World, rng: random.Random, scene: Scene) -> Choice:
    """A question about a picture."""
    makes = (*_OF_SEVERAL, *(_OF_ONE if len(scene.things) == 1 else ()))
    while True:
        if choice := rng.choice(makes)(world, rng, scene):
            return choice


def _class_of(world: World, rng: random.Random) -> Choice | None:
    name = rng.choice(world.drawings.names)
    kind = CONCEPTS[name].kind
    others = _other_classes(world, rng, {kind})
    noun = with_article(name)
    question = rng.choice((f"What is {noun}?", f"What kind of thing is {noun}?"))
    return _ask(rng, "class", question, kind, others)


def _member_of(world: World, rng: random.Random) -> Choice | None:
    name = rng.choice(world.drawings.names)
    kind = CONCEPTS[name].kind
    others = [n for n in world.drawings.names if CONCEPTS[n].kind != kind]
    question = f"Which of these is {with_article(kind)}?"
    return _ask(rng, "member", question, name, rng.sample(others, OPTIONS - 1))


def _described(world: World, rng: random.Random) -> Choice | None:
    name = rng.choice(world.drawings.names)
    if (text := world.glosses.get(name)) is None:
        return None
    others = [n for n in world.drawings.names if n != name and world.glosses.get(n) != text]
    near = [n for n in others if CONCEPTS[n].kind == CONCEPTS[name].kind]
    picked = [*rng.sample(near, min(1, len(near))), *rng.sample(others, OPTIONS)]
    picked = list(dict.fromkeys(picked))[: OPTIONS - 1]
    return _ask(rng, "gloss", f"Which of these is this: {text}?", name, picked)


def _seen_class(world: World, rng: random.Random, scene: Scene) -> Choice | None:
    kind = CONCEPTS[scene.present[0]].kind
    question = "What kind of thing does the image show?"
    return _ask(rng, "picture, class", question, kind, _other_classes(world, rng, {kind}), scene)


def _seen_member(world: World, rng: random.Random, scene: Scene) -> Choice | None:
    """Which of these kinds of things is among several things."""
    kinds = {CONCEPTS[name].kind for name in scene.present}
    kind = rng.choice(sorted(kinds))
    question = "Which of these is in the image?"
    return _ask(rng, "picture, member", question, kind, _other_classes(world, rng, kinds), scene)


def _seen_name(world: World, rng: random.Random, scene: Scene) -> Choice | None:
    others = [*world.accompanying(scene)[:2], *rng.sample(world.absent(scene), 3)]
    others = list(dict.fromkeys(others))[: OPTIONS - 1]
    question = "Which of these is in the image?"
    return _ask(rng, "picture, name", question, rng.choice(scene.present), others, scene)


def _seen_gloss(world: World, rng: random.Random, scene: Scene) -> Choice | None:
    right = world.glosses.get(scene.present[0])
    texts = sorted(set(world.glosses.values()) - {right})
    if right is None or len(texts) < OPTIONS - 1:
        return None
    others = rng.sample(texts, OPTIONS - 1)
    return _ask(rng, "picture, gloss", "What does the image show?", right, others, scene)


_OF_SEVERAL = (_seen_member, _seen_name)
_OF_ONE = (_seen_class, _seen_gloss)  # of a picture with one thing alone
_WITH_PICTURE = (_seen_class, _seen_member, _seen_name, _seen_gloss)
_WITHOUT_PICTURE = (_class_of, _member_of, _described)


def _other_classes(world: World, rng: random.Random, kinds: set[str]) -> list[str]:
    return rng.sample([k for k in sorted(world.members) if k not in kinds], OPTIONS - 1)


def _ask(
    rng: random.Random,
    relation: str,
    question: str,
    right: str,
    others: Sequence[str],
    scene: Scene | None = None,
) -> Choice:
    shown = [right, *others]
    if relation != "picture, gloss":  # its options are descriptions, all others nouns
        shown = [with_article(noun) for noun in shown]
    place = rng.randrange(OPTIONS)
    shown[0], shown[place] = shown[place], shown[0]
    return Choice(
        relation=relation,
        question=question,
        options=tuple(shown),
        answer="ABCD"[place],
        scene=scene,
    )
