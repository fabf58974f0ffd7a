"""What the language model is trained on: captions, checks, and multiple choice, row by row.

Every answer of a conversation is learnt from, so that one picture serves several questions. In a
check ("apple: Yes, cup: No") the names are given and only the answers are learnt, which makes the
model look within few steps.
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hipp_ext.calibration.encoding import padded
from hipp_ext.evals.studies.smolworld import choices
from hipp_ext.evals.studies.smolworld.painting import SIDE, paint
from hipp_ext.evals.studies.smolworld.quiz import as_question, ask_caption, presence
from hipp_ext.evals.studies.smolworld.scenes import Scene, World

CHECK = "Which of these are in the image: {}? Answer yes or no for each."
PRESENT = 3  # most present things that a conversation asks about
PER_STEP = (4, 8, 4)  # captions, looks and choices
CHOICES = 4  # most multiple-choice questions per conversation
Piece = tuple[str, bool]  # a part of an answer, and whether it is learnt


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns (question, answer in pieces) about a picture; None: the blank one."""

    turns: tuple[tuple[str, tuple[Piece, ...]], ...]
    scene: Scene | None


def caption(world: World, split: str, key: str) -> Conversation:
    """One picture and its description; all concepts are equally frequent in half of them."""
    rng = random.Random(f"caption {split} {key}")
    draw = world.draw_scene if rng.random() < 0.5 else world.draw_mixture
    asked = ask_caption(world.nth(split, f"caption {key}", draw))
    return Conversation(turns=((asked.question, ((asked.answer, True),)),), scene=asked.scene)


def looking(world: World, split: str, key: str) -> Conversation:
    """As many present as absent things of a picture: one by one as POPE asks, or in one check."""
    rng = random.Random(f"looking {split} {key}")
    draw = world.draw_scene if rng.random() < 0.75 else world.draw_mixture
    scene = world.nth(split, f"looking {key}", draw)
    present = rng.sample(scene.present, min(PRESENT, len(scene.present)))
    absent = [
        rng.choice(world.accompanying(scene)[:6]),
        rng.choice(world.popular(scene)[:20]),
        *rng.sample(world.absent(scene), 2 * PRESENT),
    ]
    absent = rng.sample(list(dict.fromkeys(absent))[: PRESENT + 1], len(present))
    asked = [(name, "Yes") for name in present] + [(name, "No") for name in absent]
    rng.shuffle(asked)
    if rng.random() < 0.5:
        turns = tuple((presence(name), ((answer, True),)) for name, answer in asked)
        return Conversation(turns=turns, scene=scene)
    pieces: list[Piece] = []
    for name, answer in asked:
        pieces += [(f"{name}:", False), (f" {answer}\n", True)]
    question = CHECK.format(", ".join(name for name, _ in asked))
    return Conversation(turns=((question, tuple(pieces)),), scene=scene)


def choosing(world: World, split: str, key: str) -> Conversation:
    """Multiple choice: some questions about one picture, or without."""
    rng = random.Random(f"choosing {split} {key}")
    if rng.random() < 0.5:
        draw = world.draw_specimen if rng.random() < 0.5 else world.draw_scene
        scene = world.nth(split, f"choosing {key}", draw)
        asked = [choices.about(world, rng, scene) for _ in range(CHOICES)]
    else:
        scene = None
        asked = [choices.without_picture(world, rng, split) for _ in range(CHOICES)]
    return _of_choices(asked, scene)


def copying(world: World, split: str, key: str) -> Conversation:
    """Multiple choice whose answers stand in the questions."""
    rng = random.Random(f"copying {split} {key}")
    return _of_choices([choices.copied(world, rng) for _ in range(CHOICES)], None)


def _of_choices(asked: Iterable[choices.Choice], scene: Scene | None) -> Conversation:
    questions = dict.fromkeys(map(as_question, asked))
    turns = tuple((question.prompt, ((question.answer, True),)) for question in questions)
    return Conversation(turns=turns, scene=scene)


SOURCES = (caption, looking, choosing)
FIRST = (caption, copying)  # what letters stand for is not learnt from harder choices alone


class Conversations:
    """Endless rows for `recover`; the rows of a step are the same in every run.

    Drawings are changed at random, so that the model is as unsure as of those it never saw.

    The loss of a step is the sum of the means over captions, looks and choices, so that the many
    tokens of captions do not outweigh the one of an answer.

    Args:
        world: the world.
        processor: the model's.
        rows: captions, looks and choices per step and process.
        first_steps: first steps, of captions and of choices that copy.
        held: number of held-out conversations of each kind, on drawings of the validation.
        seed: random seed.

    Attributes:
        held: numbers of the held-out batches.
        identity: what must be equal for a run to go on.
    """

    def __init__(
        self,
        world: World,
        processor: Any,
        rows: tuple[int, int, int] = PER_STEP,
        first_steps: int = 0,
        held: int = 16,
        seed: int = 0,
    ):
        self.world, self.processor, self.rows = world, processor, rows
        self.first_steps, self.seed = first_steps, seed
        self.held = range(len(SOURCES) * held // 8)
        self.identity = {
            "names": list(world.drawings.names),
            "rows": list(rows),
            "first_steps": first_steps,
            "held": held,
            "seed": seed,
        }

    def batches(self, rank: int, workers: int, start: int) -> Iterator[list[dict[str, Tensor]]]:
        """See `DataSource`."""
        for step in itertools.count(start):
            first = step < self.first_steps
            half = sum(self.rows) // 2
            counts = (half, sum(self.rows) - half) if first else self.rows
            yield [
                self._batch(
                    [
                        make(self.world, "train", f"{self.seed} {step} {workers} {rank} {row}")
                        for row in range(count)
                    ],
                    changed=True,
                )
                for make, count in zip(FIRST if first else SOURCES, counts, strict=True)
                if count
            ]

    def held_out(self, rank: int, workers: int) -> Iterator[dict[str, Tensor]]:
        """Batches of eight held-out conversations that this process evaluates."""
        for number in self.held[rank::workers]:
            make = SOURCES[number % len(SOURCES)]
            keys = (f"held {number} {row}" for row in range(8))
            yield self._batch([make(self.world, "validation", key) for key in keys])

    def _batch(self, rows: Sequence[Conversation], changed: bool = False) -> dict[str, Tensor]:
        return collate(self.processor, rows, changed=changed)


def collate(
    processor: Any, rows: Sequence[Conversation], *, changed: bool = False
) -> dict[str, Tensor]:
    """A left-padded batch in the words of the chat template, with labels on what is learnt.

    With `changed` the drawings are, see `painted`.
    """
    encoded = [_encode(processor, row) for row in rows]
    batch = padded(processor.tokenizer, [ids for ids, _ in encoded], [ls for _, ls in encoded])
    pictures = processor.image_processor(
        [paint(row.scene, changed=changed) for row in rows], return_tensors="pt"
    )
    return {**batch, "pixel_values": pictures["pixel_values"]}


def _encode(processor: Any, row: Conversation) -> tuple[list[int], list[int]]:
    """(ids, labels): every piece of text is encoded alone, as generation goes on from it."""
    tokenizer = processor.tokenizer
    ids: list[int] = []
    labels: list[int] = []
    for number, (question, pieces) in enumerate(row.turns):
        content = [{"type": "image"}] * (number == 0) + [{"type": "text", "text": question}]
        turn = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        image = processor.image_token
        turn = turn.replace(image, image * SIDE**2)
        parts = [(turn, False), *pieces, (tokenizer.eos_token, True), ("\n", False)]
        for text, learnt in parts:
            own = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += own
            labels += own if learnt else [-100] * len(own)
    return ids, labels
