"""What a model is asked, as data: the truth and the picture of every question and caption."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hipp_ext.evals.studies.smolworld.quiz import CAPTIONS, CHOICE, POPE, Question, questions
from hipp_ext.evals.studies.smolworld.scenes import World

MOST_PER_PICTURE = 12  # questions of POPE: three present things, three absent ones of each kind
Questions = tuple[Question, ...]


@dataclass(frozen=True, kw_only=True)
class Paper:
    """The questions of a split.

    Attributes:
        pope, choice, captions: of each task. Captions are asked of POPE's pictures.
    """

    pope: Questions
    choice: Questions
    captions: Questions = ()

    @classmethod
    def of(cls, world: World, split: str, pictures: int, choices: int) -> "Paper":
        """The questions on the first pictures of a split, and its first multiple choice."""
        pope = questions(world, POPE, split, MOST_PER_PICTURE * pictures)
        known = set(list(dict.fromkeys(q.picture for q in pope))[:pictures])
        return cls(
            pope=tuple(q for q in pope if q.picture in known),
            choice=questions(world, CHOICE, split, choices),
            captions=questions(world, CAPTIONS, split, pictures),
        )

    def asked(self, names: Sequence[str]) -> "Asked":
        """The truth, without the pictures.

        Args:
            names: every concept that a caption may name.
        """
        numbers: dict[str | None, int] = {}

        def picture(question: Question) -> str:
            return f"picture {numbers.setdefault(question.picture, len(numbers))}"

        return Asked(
            names=tuple(names),
            pope=tuple((q.answer, q.category, picture(q)) for q in self.pope),
            choice=tuple(
                (q.answer, q.category, picture(q) if q.scene else f"question {q.index}")
                for q in self.choice
            ),
            captions=tuple((tuple(q.scene.present), picture(q)) for q in self.captions if q.scene),
        )


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The truth of a paper, which a folder of results keeps.

    Attributes:
        names: every concept.
        pope: (answer, kinds of absence with commas between them, picture) of every question.
        choice: (answer, relation, picture or the question itself) of every question.
        captions: (what the picture shows, picture) of every caption.
    """

    names: tuple[str, ...]
    pope: tuple[tuple[str, str, str], ...]
    choice: tuple[tuple[str, str, str], ...]
    captions: tuple[tuple[tuple[str, ...], str], ...]

    def to_json(self) -> dict[str, Any]:
        """The values as JSON holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> "Asked":
        """The inverse of `to_json`; lists become the tuples that they were."""
        return cls(
            names=tuple(values["names"]),
            pope=tuple(map(tuple, values["pope"])),
            choice=tuple(map(tuple, values["choice"])),
            captions=tuple((tuple(objects), picture) for objects, picture in values["captions"]),
        )
