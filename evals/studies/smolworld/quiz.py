"""Questions about the world: POPE as its authors define it, multiple choice, and captions."""

import dataclasses
import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from hipp_ext.errors import DataError
from hipp_ext.evals.captions import PROMPT
from hipp_ext.evals.studies.smolworld import choices
from hipp_ext.evals.studies.smolworld.concepts import listed, with_article
from hipp_ext.evals.studies.smolworld.painting import paint
from hipp_ext.evals.studies.smolworld.scenes import Scene, World
from hipp_ext.prompts import choice_prompt
from hipp_ext.testbed import SPLITS

TASKS = POPE, CHOICE, CAPTIONS = ("POPE", "ScienceQA", "Captions")
# Pictures of POPE and of captions, and multiple-choice questions, per split.
IMAGES = {"calibration": 128, "search": 128, "validation": 128, "test": 500}
CHOICES = {"calibration": 512, "search": 512, "validation": 512, "test": 2000}
PER_KIND = 3  # POPE: most present things, and absent things of each kind, per picture
KINDS = ("random", "popular", "adversarial")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One row of a data set, with the fields that `Evaluator` reads.

    Attributes:
        index: place in the data set, from 0.
        question: the text, without options.
        answer: Yes, No, the letter of an option, or a caption.
        category: POPE's kinds of absence with commas between them; the relation of a choice.
        options: options of multiple choice.
        scene: what the picture shows; None: a blank one, which does not matter.
    """

    index: int = 0
    question: str
    answer: str
    category: str
    options: tuple[str, ...] = ()
    scene: Scene | None = None

    @property
    def image(self) -> Image.Image:
        """The picture, 96 x 96 px RGB, with the same bytes as in the exported TSV; it is shared."""
        return _picture(self.scene)

    @property
    def picture(self) -> str | None:
        """Identifies the picture; None if no picture matters."""
        return None if self.scene is None else str(self.scene)

    @property
    def labels(self) -> tuple[str, ...]:
        """The possible answers; none for a caption."""
        if self.category == CAPTIONS:
            return ()
        return tuple("ABCD"[: len(self.options)]) or ("Yes", "No")

    @property
    def prompt(self) -> str:
        """The text that VLMEvalKit makes of the row."""
        if not self.options:
            return self.question
        return choice_prompt(self.question, dict(zip(self.labels, self.options, strict=True)))


@functools.lru_cache(maxsize=1024)
def _picture(scene: Scene | None) -> Image.Image:
    """A picture, painted once for all questions about it."""
    return paint(scene)


def questions(world: World, task: str, split: str, n: int | None = None) -> tuple[Question, ...]:
    """The questions of a split, always equal and in the same order.

    Args:
        world: the world.
        task: "POPE" (per picture up to 3 present things and as many absent ones of each kind, each
            named once), "ScienceQA" (four options; half of them need the picture) or "Captions" (of
            POPE's pictures).
        split: "calibration", "search", "validation" or "test"; they share no picture, and no
            question without a picture. Only calibration shows drawings that training shows.
        n: number of questions; None: the default size. More are drawn on request.

    Raises:
        DataError: an unknown task or split.
    """
    if task not in TASKS or split not in SPLITS:
        raise DataError(
            f"No questions for task {task!r}, split {split!r}: tasks {TASKS}, splits {SPLITS}."
        )
    scenes = world.stream(split)
    if n is None and task != "ScienceQA":
        scenes = itertools.islice(scenes, IMAGES[split])
    if task == "POPE":
        groups = (ask_all(world, scene, split, i) for i, scene in enumerate(scenes))
        rows: Iterator[Question] = itertools.chain.from_iterable(groups)
    elif task == "Captions":
        rows = map(ask_caption, scenes)
    else:
        n = CHOICES[split] if n is None else n
        rows = (ask_choice(world, split, i) for i in itertools.count())
    return tuple(dataclasses.replace(q, index=i) for i, q in enumerate(itertools.islice(rows, n)))


def ask_all(world: World, scene: Scene, split: str, key: object) -> list[Question]:
    """POPE's questions about a scene; each kind has as many "No" as there are "Yes"."""
    rng = random.Random(f"pope {split} {key}")
    count = min(PER_KIND, len(scene.present))
    absent = {
        "random": rng.sample(world.absent(scene), count),
        "popular": world.popular(scene)[:count],
        "adversarial": world.accompanying(scene)[:count],
    }
    asked = {name: ("Yes", ",".join(KINDS)) for name in rng.sample(scene.present, count)}
    for name in dict.fromkeys(itertools.chain.from_iterable(absent.values())):
        asked[name] = "No", ",".join(kind for kind in KINDS if name in absent[kind])
    return [
        Question(question=presence(name), answer=answer, category=category, scene=scene)
        for name, (answer, category) in asked.items()
    ]


def presence(name: str) -> str:
    """POPE's question about one concept."""
    return f"Is there {with_article(name)} in the image? Please answer yes or no."


def ask_caption(scene: Scene) -> Question:
    """The request to describe a picture; the largest things are named first."""
    return Question(question=PROMPT, answer=caption(scene.present), category=CAPTIONS, scene=scene)


def caption(names: Sequence[str]) -> str:
    """A sentence that names what is in a picture."""
    return f"The image shows {listed(names)}."


def ask_choice(world: World, split: str, key: object) -> Question:
    """A multiple-choice question of a split, in equal shares with and without a picture."""
    return as_question(choices.nth(world, split, key))


def as_question(choice: choices.Choice) -> Question:
    """A row of a multiple-choice data set."""
    return Question(
        question=choice.question,
        answer=choice.answer,
        category=choice.relation,
        options=choice.options,
        scene=choice.scene,
    )
