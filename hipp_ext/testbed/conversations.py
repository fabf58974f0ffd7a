"""What the testbed's model is trained on: endless conversations, and batches of them.

Checks ("cup Yes dog No ...") make grounding appear within a hundred steps, because the answer
directly follows the name. With single questions alone, the model kept answering from the language
prior.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hipp_ext.testbed import facts, world
from hipp_ext.testbed.model import CHECK, WORD
from hipp_ext.testbed.quiz import (
    DESCRIBE,
    ask_fact,
    ask_presence,
    choice_stream,
    facts_of_objects,
    wordings,
)

Turn = tuple[str, str]  # what the user says, what the assistant answers
# A conversation, its scene (None: blank), and whether it has a picture.
Row = tuple[list[Turn], world.Scene | None, bool]


def _presence(scene: world.Scene, asked: Sequence[tuple[str, str]]) -> Row:
    return (
        [(ask_presence(scene, name, answer, "").prompt, answer) for name, answer in asked],
        scene,
        True,
    )


def balanced(seed: int) -> Iterator[Row]:
    """Up to four present and as many absent objects per picture, half of the absent ones likely."""
    rng, scenes = random.Random(f"looking {seed}"), world.stream("train", seed=seed + 2)
    for scene in scenes:
        present = rng.sample(scene.present, min(4, len(scene.present)))
        likely = rng.sample(world.adversarial(scene)[:3], 2)
        absent = list(dict.fromkeys([*likely, *rng.sample(scene.absent, 4)]))
        asked = [(name, "Yes") for name in present]
        asked += [(name, "No") for name in absent[: len(present)]]
        rng.shuffle(asked)
        yield _presence(scene, asked)


def with_prior(seed: int, max_absent: int = 3) -> Iterator[Row]:
    """Questions on one picture in which absent objects are seldom likely ones.

    The data of real VLMs is similar. So there is a language prior ("a kitchen has cups"), which a
    model falls back on when it no longer uses the picture.
    """
    rng, scenes = random.Random(f"looking {seed}"), world.stream("train", seed=seed + 2)
    for scene in scenes:
        count = min(rng.randint(1, 4), len(scene.present))
        asked = [(name, "Yes") for name in rng.sample(scene.present, count)]
        absent = dict.fromkeys(rng.sample(scene.absent, rng.randint(1, max_absent)))
        if rng.random() < 0.3:
            absent[rng.choice(world.adversarial(scene)[:3])] = None
        asked += [(name, "No") for name in absent]
        rng.shuffle(asked)
        yield _presence(scene, asked)


def mostly_yes(seed: int) -> Iterator[Row]:
    """As `with_prior`, with more answers Yes than No, as in instruction data."""
    return with_prior(seed, max_absent=1)


def checks(seed: int) -> Iterator[Row]:
    """Names of objects, each followed by whether it is in the picture; the names are no labels."""
    rng, scenes = random.Random(f"checks {seed}"), world.stream("train", seed=seed + 4)
    for scene in scenes:
        present = rng.sample(scene.present, min(4, len(scene.present)))
        absent = [*rng.sample(world.adversarial(scene)[:3], 2), *rng.sample(scene.absent, 3)]
        names = [*present, *dict.fromkeys(absent)]
        rng.shuffle(names)
        text = " ".join(f"{name} {'Yes' if name in present else 'No'}" for name in names)
        yield [(CHECK, text)], scene, True


def captions(seed: int) -> Iterator[Row]:
    """Lists of the objects in a picture."""
    for scene in world.stream("train", seed=seed + 3):
        yield [(DESCRIBE, " ".join(scene.present))], scene, True


def reading(seed: int, turns: int = 12) -> Iterator[Row]:
    """Facts about creatures without pictures and options; the answer is the letter alone."""
    rng, known = random.Random(f"reading {seed}"), list(facts.creature_facts())
    while True:
        rng.shuffle(known)
        for start in range(0, len(known) - turns + 1, turns):
            some = known[start : start + turns]
            asked = [(f"Question: {rng.choice(fact.questions)}", fact.letter) for fact in some]
            yield asked, None, False


def choosing(seed: int, turns: int = 4) -> Iterator[Row]:
    """Multiple choice in the benchmark's wording: half on a picture, half on creatures."""
    rng, choices = random.Random(f"choosing {seed}"), choice_stream("train", seed)
    specimens = world.stream("train", world.draw_specimen, seed)
    ways = [way for way in wordings(facts.creature_facts()) if world.owner(way) == "train"]
    for number in itertools.count():
        scene = next(specimens) if number % 2 else None
        if scene is not None:
            known = facts_of_objects()[scene.present[0]]
            asked = [
                ask_fact(fact, rng.randrange(2), next(choices).hint, scene)
                for fact in rng.sample(known, 3)
            ]
        else:
            asked = [ask_fact(*way) for way in rng.sample(ways, turns)]
        yield [(question.prompt, question.answer) for question in asked], scene, True


# (source, rows per step and process) of the recovery of a pruned model.
RECOVERY = ((checks, 10), (balanced, 28), (captions, 2), (reading, 2), (choosing, 6))


@dataclass(frozen=True, kw_only=True)
class TrainingQuestion:
    """One question with its answer; `image` is None if it has no picture."""

    prompt: str
    image: Any
    answer: str


def training_questions(seed: int, *, pictures: bool) -> list[Iterator[TrainingQuestion]]:
    """Endless questions of the training split, for models of any kind.

    Args:
        seed: random seed.
        pictures: True: POPE's questions with captions, and multiple choice. False: multiple
            choice without pictures only.
    """
    if not pictures:
        return [_one_by_one(row for row in choosing(seed) if row[1] is None)]
    looked = balanced(seed)
    groups = zip(looked, looked, looked, looked, captions(seed), strict=False)
    captioned = (row for group in groups for row in group)
    return [_one_by_one(captioned, True), _one_by_one(choosing(seed), True)]


def _one_by_one(rows: Iterator[Row], pictures: bool = False) -> Iterator[TrainingQuestion]:
    for turns, scene, _ in rows:
        image = (world.blank() if scene is None else world.render(scene)) if pictures else None
        for question, answer in turns:
            yield TrainingQuestion(prompt=question, image=image, answer=answer)


def collate(processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """A right-padded batch with labels on the answers, in the words of the chat template."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    tokenizer = processor.tokenizer
    encoded = [_encode(processor, turns, pictured) for turns, _, pictured in rows]
    ids, labels = ([torch.tensor(row[part]) for row in encoded] for part in range(2))
    batch = {
        "input_ids": pad_sequence(ids, True, tokenizer.pad_token_id),
        "labels": pad_sequence(labels, True, -100),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True),
    }
    if rows[0][2]:
        batch["pixel_values"] = pixel_values([scene for _, scene, _ in rows])
    return batch


def pixel_values(scenes: Sequence[world.Scene | None]) -> Any:
    """The pictures as the processor returns them: [scenes, 3, 40, 40], from -1 to 1."""
    import torch

    blank = np.asarray(world.blank())
    stack = np.stack([blank if scene is None else world.pixels(scene) for scene in scenes])
    return torch.from_numpy(stack).permute(0, 3, 1, 2) / 127.5 - 1


def _encode(processor: Any, turns: Sequence[Turn], pictured: bool) -> tuple[list[int], list[int]]:
    """(ids, labels) of a conversation."""
    tokenizer = processor.tokenizer
    ids, labels = [tokenizer.bos_token_id], [-100]
    for number, (question, answer) in enumerate(turns):
        picture = [processor.image_token_id] * 25 * (pictured and number == 0)
        asked = [*_ids(tokenizer, "USER:"), *picture, *_ids(tokenizer, f"{question} ASSISTANT:")]
        answered = [*_ids(tokenizer, answer), tokenizer.eos_token_id]
        ids += asked + answered
        # The names in a check are given, not predicted.
        given = [question == CHECK and i % 2 == 0 for i in range(len(answered))]
        labels += [-100] * len(asked)
        labels += [-100 if skip else i for skip, i in zip(given, answered, strict=True)]
    return ids, labels


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(WORD.findall(text))
