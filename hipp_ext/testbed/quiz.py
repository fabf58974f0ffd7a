"""Questions about the picture world: POPE as its authors define it, and ScienceQA on facts."""

import dataclasses
import functools
import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from PIL import Image

from hipp_ext.errors import DataError
from hipp_ext.prompts import choice_prompt
from hipp_ext.testbed import facts, world

TASKS = ("POPE", "ScienceQA")
CAPTIONS = "Captions"  # open questions, which have an answer and no candidates
DESCRIBE = "Describe the image."
# POPE and captions: pictures per split.
IMAGES = {"calibration": 64, "search": 64, "validation": 64, "test": 250}
# ScienceQA: questions per split.
CHOICES = {"calibration": 256, "search": 256, "validation": 256, "test": 800}
PER_KIND = 3  # POPE: present objects, and absent objects of each kind, per picture
PICTURE_SHARE = 0.25  # ScienceQA: fraction of questions that need the picture
HINTS = (
    None,
    "This is a question about nature.",
    "One of the options is right.",
    "Think of what you read.",
    "Look and think.",
    "Three of the options are wrong.",
    "This was in the book.",
    "There is a picture.",
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One row of a data set; without a `scene` it is asked with a blank picture."""

    index: int
    question: str
    answer: str
    category: str
    options: tuple[str, ...] = ()
    hint: str | None = None
    scene: world.Scene | None = None

    @property
    def image(self) -> Image.Image:
        """The picture, 40 x 40 px RGB, with the same bytes as in the exported TSV."""
        return world.blank() if self.scene is None else world.render(self.scene)

    @property
    def picture(self) -> str | None:
        """Identifies the picture; None if no picture matters."""
        return None if self.scene is None else str(self.scene)

    @property
    def labels(self) -> tuple[str, ...]:
        """The possible answers: Yes and No, or the letters of the options; none for a caption."""
        if self.category == CAPTIONS:
            return ()
        return tuple("ABCD"[: len(self.options)]) or ("Yes", "No")

    @property
    def prompt(self) -> str:
        """The text that VLMEvalKit makes of the row: question, or hint, question and options."""
        if not self.options:
            return self.question
        options = dict(zip(self.labels, self.options, strict=True))
        return choice_prompt(self.question, options, self.hint or "")


def questions(task: str, split: str, n: int | None = None) -> tuple[Question, ...]:
    """The questions of a split, always equal and in the same order; `index` counts from 0.

    Args:
        task: "POPE" (per picture 3 present objects, and 3 random, 3 popular and 3 adversarial
            absent ones, each named once), "ScienceQA" (2-4 options; a quarter needs the
            picture, the rest only facts) or "Captions" (of POPE's pictures; the answer names all
            objects in the order of `world.OBJECTS`, and the model was trained on others).
        split: "calibration", "search", "validation" or "test"; they share no picture and no
            wording.
        n: number of questions; None: the default size. More questions are drawn on request.

    Raises:
        DataError: an unknown task or split.
    """
    if task not in (*TASKS, CAPTIONS) or split not in world.SPLITS:
        raise DataError(
            f"No questions for task {task!r}, split {split!r}: tasks {(*TASKS, CAPTIONS)}, splits "
            f"{world.SPLITS}."
        )
    if task == CAPTIONS:
        scenes = itertools.islice(world.stream(split), IMAGES[split] if n is None else n)
        rows = map(ask_caption, scenes)
    elif task == "POPE":
        groups = pope_groups(split)
        rows = itertools.chain.from_iterable(
            itertools.islice(groups, IMAGES[split]) if n is None else groups
        )
    else:
        rows = itertools.islice(choice_stream(split), CHOICES[split] if n is None else n)
    return tuple(
        dataclasses.replace(row, index=index) for index, row in enumerate(itertools.islice(rows, n))
    )


def pope_groups(split: str) -> Iterator[list[Question]]:
    """For each picture of an endless stream, its 6 to 12 different questions."""
    rng = random.Random(f"pope {split}")
    for scene in world.stream(split):
        negatives = {
            "random": rng.sample(scene.absent, PER_KIND),
            "popular": world.popular(scene)[:PER_KIND],
            "adversarial": world.adversarial(scene)[:PER_KIND],
        }
        asked: dict[str, tuple[str, str]] = dict.fromkeys(
            rng.sample(scene.present, PER_KIND), ("Yes", ",".join(negatives))
        )
        for name in dict.fromkeys(itertools.chain.from_iterable(negatives.values())):
            asked[name] = (
                "No",
                ",".join(kind for kind, names in negatives.items() if name in names),
            )
        yield [
            ask_presence(scene, name, answer, category)
            for name, (answer, category) in asked.items()
        ]


def ask_presence(scene: world.Scene, name: str, answer: str, category: str) -> Question:
    """POPE's question about one object."""
    text = f"Is there a {name} in the image? Please answer yes or no."
    return Question(index=0, question=text, answer=answer, category=category, scene=scene)


def ask_caption(scene: world.Scene) -> Question:
    """The request to describe a picture."""
    answer = " ".join(scene.present)
    return Question(index=0, question=DESCRIBE, answer=answer, category=CAPTIONS, scene=scene)


def choice_stream(split: str, seed: int = 0) -> Iterator[Question]:
    """Endless multiple choice. A fact has sixteen wordings, each in one split or in "train"."""
    rng = random.Random(f"choice {split} {seed}")
    specimens = world.stream(split, world.draw_specimen, seed)
    read = _shuffled(rng, [w for w in wordings(facts.creature_facts()) if world.owner(w) == split])
    while True:
        if rng.random() < PICTURE_SHARE:
            scene = next(specimens)
            fact = rng.choice(facts_of_objects()[scene.present[0]])
            yield ask_fact(fact, rng.randrange(2), rng.choice(HINTS), scene)
        else:
            yield ask_fact(*next(read))


def wordings(known: Iterable[facts.Fact]) -> list[tuple[facts.Fact, int, str | None]]:
    """All wordings of the facts: (fact, number of the question, hint)."""
    return [(fact, which, hint) for fact in known for which in range(2) for hint in HINTS]


def ask_fact(
    fact: facts.Fact, which: int, hint: str | None, scene: world.Scene | None = None
) -> Question:
    """A multiple-choice question for a fact."""
    return Question(
        index=0,
        question=fact.questions[which],
        answer=fact.letter,
        category=fact.relation,
        options=fact.options,
        hint=hint,
        scene=scene,
    )


def _shuffled(rng: random.Random, items: list) -> Iterator:
    while True:
        yield from rng.sample(items, len(items))


@functools.cache
def facts_of_objects() -> dict[str, list[facts.Fact]]:
    """The facts about each object."""
    known = facts.object_facts(world.OBJECTS)
    return {name: [fact for fact in known if fact.subject == name] for name in world.OBJECTS}
