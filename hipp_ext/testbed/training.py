"""Train the testbed's model from nothing: minutes on two CPU cores.

First the vision tower learns to name the object in each cell; then the language model reads facts until it knows them,
which takes several times longer in company; then the whole model learns from conversations: checks
("cup Yes dog No ..."), several questions about one picture, captions (lists of objects), and facts. The checks are what
makes grounding appear, within a hundred steps: there the answer follows the name at once. Single questions alone never left
the language prior. Hidden matrices are trained with Muon, which needs a third of Adam's steps here.
"""

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hipp_ext.files import new_folder
from hipp_ext.testbed import facts, world
from hipp_ext.testbed.model import CHECK, DESCRIBE, EMPTY, WORD, build_model, build_processor
from hipp_ext.testbed.quiz import ask_fact, ask_presence, choice_stream, facts_of_objects, wordings

RATE, MUON_RATE = 2e-3, 0.02  # peak learning rates of AdamW and Muon
Turn = tuple[str, str]  # what the user says, what the assistant answers
Row = tuple[
    list[Turn], world.Scene | None, bool
]  # a conversation, its picture (None: blank), whether it has one at all


def train(
    out_dir: str | Path,
    *,
    seed: int = 0,
    vision_steps: int = 200,
    fact_steps: int = 220,
    steps: int = 700,
    look_steps: int = 450,
    overwrite: bool = False,
    progress: bool = True,
    **sizes: int,
) -> dict[str, list[float]]:
    """Train a model and write it, with its processor, to `out_dir`; nothing is left there by a run that fails.

    Args:
        out_dir: a folder for `load`: safetensors and JSON.
        seed: of parameters and of the order of the data; the same seed gives the same weights on the same machine with
            the same number of threads.
        vision_steps, fact_steps, steps, look_steps: optimizer steps of the stages; there are two of looking.
        overwrite: replace an existing folder.
        progress: show a progress bar.
        **sizes: of the language model, see `build_model`.

    Returns:
        The losses of each step: "vision", "facts", "language", "looking" and "leaning" (nats).

    Raises:
        OutputExistsError: `out_dir` exists and `overwrite` is False.
    """
    model, processor = build_model(seed, **sizes), build_processor()
    _initialise(model, seed)
    with new_folder(out_dir, overwrite) as folder, _bar(progress) as track:
        losses = {
            "vision": _train_vision(model, processor, track, vision_steps, seed),
            "facts": _train_language(model, processor, track, fact_steps, ((_reading, 16),), seed),
            "language": _train_language(model, processor, track, steps, ALL, seed + 1),
            "looking": _train_language(
                model, processor, track, look_steps, LOOKING, seed + 2, rate=0.6
            ),
            "leaning": _train_language(
                model, processor, track, look_steps, LEANING, seed + 3, rate=0.6
            ),
        }
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return losses


def _initialise(model: Any, seed: int) -> None:
    """Heads that begin by attending to tokens like their own: queries and keys start as the same projection.

    Source: Trockman and Kolter, Mimetic Initialization of Self-Attention Layers (arXiv 2305.09828), simplified.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    tower = model.model.language_model
    with torch.no_grad():
        tower.embed_tokens.weight.normal_(0, 0.5, generator=generator)
        for layer in tower.layers:
            for name, weight in layer.named_parameters():
                if weight.dim() == 2:
                    residual = "o_proj" in name or "down_proj" in name
                    weight.normal_(
                        0,
                        0.08 / (math.sqrt(2 * len(tower.layers)) if residual else 1),
                        generator=generator,
                    )
            attention = layer.self_attn
            for head in attention.q_proj.weight.split(attention.head_dim):
                head.copy_(
                    1.2 * torch.linalg.qr(torch.randn(head.T.shape, generator=generator))[0].T
                )
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            for projection in (attention.q_proj, attention.k_proj):
                projection.weight.add_(
                    torch.randn(projection.weight.shape, generator=generator), alpha=0.03
                )


def _train_vision(
    model: Any, processor: Any, track: Callable, steps: int, seed: int
) -> list[float]:
    """Make what the projector says of each cell resemble the word for the object there, or the word for none."""
    import torch

    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    words = model.get_input_embeddings().weight
    ids = processor.tokenizer.convert_tokens_to_ids([EMPTY, *world.OBJECTS])
    scenes = world.stream("train", seed=seed + 1)
    optimizer = torch.optim.AdamW([*tower.parameters(), *projector.parameters(), words], lr=1e-3)
    losses = []
    for _ in track(steps, "naming objects"):
        batch = list(itertools.islice(scenes, 64))
        features = model.model.get_image_features(_pictures(batch)).pooler_output
        names = [dict(scene.cells) for scene in batch]
        targets = torch.tensor(
            [
                [1 + world.OBJECTS.index(n[cell]) if cell in n else 0 for cell in range(25)]
                for n in names
            ]
        )
        loss = torch.nn.functional.cross_entropy(
            torch.cat(list(features)) @ words[ids].T, targets.flatten()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _train_language(
    model: Any,
    processor: Any,
    track: Callable,
    steps: int,
    sources: Sequence[tuple[Callable, int]],
    seed: int,
    rate: float = 1.0,
) -> list[float]:
    import torch

    hidden = {
        id(p) for n, p in model.named_parameters() if p.dim() == 2 and "language_model.layers" in n
    }
    rest = [p for p in model.parameters() if id(p) not in hidden]
    optimizers = [
        torch.optim.AdamW(rest, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01),
        torch.optim.Muon(
            [p for p in model.parameters() if id(p) in hidden], lr=MUON_RATE, weight_decay=0.01
        ),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate * _share_of_rate(step, steps))
        for o in optimizers
    ]
    losses = []
    streams = [(make(seed), count) for make, count in sources]
    for _ in track(steps, f"learning from {len(streams)} sources"):
        total = 0.0
        for source, count in streams:
            loss = model(**collate(processor, list(itertools.islice(source, count)))).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        losses.append(total)
    return losses


def _share_of_rate(step: int, steps: int) -> float:
    """A short warm-up, then a linear fall to zero over the last 60%."""
    return min(1.0, (step + 1) / 30, (steps - step) / (0.6 * steps))


def collate(processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """A right-padded batch with labels on the answers; the tokens are those of the processor's chat template."""
    import torch

    tokenizer = processor.tokenizer
    encoded = []
    for turns, _, pictured in rows:
        ids, labels = [tokenizer.bos_token_id], [-100]
        for number, (question, answer) in enumerate(turns):
            picture = [processor.image_token_id] * 25 * (pictured and number == 0)
            asked = _ids(tokenizer, "USER:") + picture + _ids(tokenizer, f"{question} ASSISTANT:")
            said = [*_ids(tokenizer, answer), tokenizer.eos_token_id]
            ids += asked + said
            # What a check names is given, not predicted.
            labels += [-100] * len(asked) + [
                -100 if question == CHECK and i % 2 == 0 else t for i, t in enumerate(said)
            ]
        encoded.append((ids, labels))
    longest = max(len(ids) for ids, _ in encoded)
    batch = {
        "input_ids": torch.tensor(
            [ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in encoded]
        ),
        "labels": torch.tensor(
            [labels + [-100] * (longest - len(labels)) for _, labels in encoded]
        ),
        "attention_mask": torch.tensor(
            [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in encoded]
        ),
    }
    if rows[0][2]:
        batch["pixel_values"] = _pictures([scene for _, scene, _ in rows])
    return batch


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(WORD.findall(text))


def _balanced(seed: int) -> Iterator[Row]:
    """Endless: up to four objects that are in the picture and as many that are not, half of these to be expected there."""
    rng, scenes = random.Random(f"looking {seed}"), world.stream("train", seed=seed + 2)
    for scene in scenes:
        there = rng.sample(scene.present, min(4, len(scene.present)))
        absent = dict.fromkeys(
            [*rng.sample(world.adversarial(scene)[:3], 2), *rng.sample(scene.absent, 4)]
        )
        asked = [(name, "Yes") for name in there] + [
            (name, "No") for name in list(absent)[: len(there)]
        ]
        rng.shuffle(asked)
        yield (
            [(ask_presence(scene, name, answer, "").prompt, answer) for name, answer in asked],
            scene,
            True,
        )


def _looking(seed: int, most_absent: int = 3) -> Iterator[Row]:
    """Endless questions about one picture, one after another; what is absent is seldom to be expected there.

    As in the data that real VLMs learn from: so there is a language prior ("a kitchen has cups"), and a model that no longer
    looks falls back on it.
    """
    rng, scenes = random.Random(f"looking {seed}"), world.stream("train", seed=seed + 2)
    for scene in scenes:
        asked = [
            (name, "Yes")
            for name in rng.sample(scene.present, min(rng.randint(1, 4), len(scene.present)))
        ]
        absent = dict.fromkeys(rng.sample(scene.absent, rng.randint(1, most_absent)))
        if rng.random() < 0.3:
            absent[rng.choice(world.adversarial(scene)[:3])] = None
        asked += [(name, "No") for name in absent]
        rng.shuffle(asked)
        yield (
            [(ask_presence(scene, name, answer, "").prompt, answer) for name, answer in asked],
            scene,
            True,
        )


def _mostly_present(seed: int) -> Iterator[Row]:
    """Questions about a picture that lean towards yes, as instruction data does."""
    return _looking(seed, most_absent=1)


def _checks(seed: int) -> Iterator[Row]:
    """Endless: objects named one after another, each followed by whether it is in the picture; the names are no answers."""
    rng, scenes = random.Random(f"checks {seed}"), world.stream("train", seed=seed + 4)
    for scene in scenes:
        there = rng.sample(scene.present, min(4, len(scene.present)))
        names = [
            *there,
            *dict.fromkeys(
                [*rng.sample(world.adversarial(scene)[:3], 2), *rng.sample(scene.absent, 3)]
            ),
        ]
        rng.shuffle(names)
        yield (
            [(CHECK, " ".join(f"{name} {'Yes' if name in there else 'No'}" for name in names))],
            scene,
            True,
        )


def _captions(seed: int) -> Iterator[Row]:
    """Endless lists of what is in a picture."""
    for scene in world.stream("train", seed=seed + 3):
        yield [(DESCRIBE, " ".join(scene.present))], scene, True


def _reading(seed: int, turns: int = 12) -> Iterator[Row]:
    """Endless bare facts about creatures, without a picture and without the options: the letter alone."""
    rng, known = random.Random(f"reading {seed}"), list(facts.creature_facts())
    while True:
        rng.shuffle(known)
        for start in range(0, len(known) - turns + 1, turns):
            some = known[start : start + turns]
            yield (
                [(f"Question: {rng.choice(fact.questions)}", fact.letter) for fact in some],
                None,
                False,
            )


def _choosing(seed: int, turns: int = 4) -> Iterator[Row]:
    """Endless multiple choice in the benchmark's wording: half about the thing in a picture, half about creatures."""
    rng, choices = random.Random(f"choosing {seed}"), choice_stream("train", seed)
    specimens = world.stream("train", world.draw_specimen, seed)
    ways = [way for way in wordings(facts.creature_facts()) if world.owner(way) == "train"]
    for number in itertools.count():
        if number % 2:
            scene = next(specimens)
            known = facts_of_objects()[scene.present[0]]
            asked = [
                ask_fact(fact, rng.randrange(2), next(choices).hint, scene)
                for fact in rng.sample(known, 3)
            ]
        else:
            scene, asked = None, [ask_fact(*way) for way in rng.sample(ways, turns)]
        yield [(question.prompt, question.answer) for question in asked], scene, True


# Rows per step of each source.
ALL = ((_checks, 12), (_balanced, 14), (_captions, 8), (_reading, 8), (_choosing, 8))
LOOKING = ((_checks, 10), (_looking, 32), (_captions, 4), (_reading, 2), (_choosing, 6))
LEANING = ((_checks, 10), (_mostly_present, 32), (_captions, 4), (_reading, 2), (_choosing, 6))
RECOVERING = (
    (_checks, 10),
    (_balanced, 28),
    (_captions, 2),
    (_reading, 2),
    (_choosing, 6),
)  # of each process


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One question with its answer, to be learned; `image` None: it has no picture."""

    prompt: str
    image: Any
    answer: str


def questions_to_learn(seed: int, *, pictures: bool) -> list[Iterator[Lesson]]:
    """The training split's questions for models of any kind, endless: POPE's and captions, and multiple choice.

    Args:
        pictures: False: multiple choice without a picture alone.
    """
    if not pictures:
        return [_one_by_one(row for row in _choosing(seed) if row[1] is None)]
    looked, captions = _balanced(seed), _captions(seed)
    captioned = (
        row for four in zip(looked, looked, looked, looked, captions, strict=False) for row in four
    )
    return [_one_by_one(captioned, True), _one_by_one(_choosing(seed), True)]


def _one_by_one(rows: Iterator[Row], pictures: bool = False) -> Iterator[Lesson]:
    for turns, scene, _ in rows:
        image = (world.blank() if scene is None else world.render(scene)) if pictures else None
        for question, answer in turns:
            yield Lesson(prompt=question, image=image, answer=answer)


def _pictures(scenes: Sequence[world.Scene | None]) -> Any:
    """The pictures as the processor would hand them to the model: [scenes, 3, 40, 40] in -1..1."""
    import torch

    blank = np.asarray(world.blank())
    stack = np.stack([blank if scene is None else world.pixels(scene) for scene in scenes])
    return torch.from_numpy(stack).permute(0, 3, 1, 2) / 127.5 - 1


@contextlib.contextmanager
def _bar(show: bool) -> Iterator[Callable[[int, str], Iterable[int]]]:
    """Yield track(steps, name): like range(steps), with a progress bar when `show`."""
    from rich.progress import Progress

    with Progress(disable=not show) as progress:
        yield lambda steps, name: progress.track(range(steps), description=name)
