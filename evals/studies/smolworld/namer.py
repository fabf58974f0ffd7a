"""A tower that names patches, in the words of the language model; and how well it does.

A patch's feature goes through the projector, and is compared with the embeddings of all names, and
of a word for none.

Differs from CLIP: names are compared with patches, so that the language model finds them there,
and the embeddings of the names are SmolLM2's and stay.
"""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hipp_ext.evals.studies.measuring import mean_and_se
from hipp_ext.evals.studies.smolworld.model import name_embeddings
from hipp_ext.evals.studies.smolworld.painting import painted, patch_things
from hipp_ext.evals.studies.smolworld.scenes import Scene, World
from hipp_ext.modes import evaluating

NOTHING = "nothing"  # the word for a patch without a thing
EVALUATED = 256  # scenes of each kind
BATCH = 64  # scenes


class Namer(nn.Module):
    """Tower and projector of `model`, and the names that its patches are compared with."""

    names: Tensor

    def __init__(self, model: Any, processor: Any, world: World):
        super().__init__()
        self.vision_tower = model.model.vision_tower
        self.multi_modal_projector = model.model.multi_modal_projector
        words = [NOTHING, *world.drawings.all_names]
        embedding = model.get_input_embeddings()
        self.size = float(embedding.weight.detach().norm(dim=-1).mean())
        names = name_embeddings(embedding, processor.tokenizer, words)
        self.register_buffer("names", nn.functional.normalize(names - names.mean(0), dim=-1))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def logits(self, pixel_values: Tensor) -> Float[Tensor, "rows patches names"]:
        """How well each name fits each patch."""
        hidden = self.vision_tower(pixel_values).last_hidden_state[:, 1:]
        found = nn.functional.normalize(self.multi_modal_projector(hidden), dim=-1)
        return self.log_scale.exp() * found @ self.names.T

    def forward(self, pixel_values: Tensor, input_ids: Int[Tensor, "rows patches"]) -> Any:
        """An output whose `loss` is the cross-entropy of the names in `input_ids` [nats]."""
        logits = self.logits(pixel_values)
        return SimpleNamespace(
            loss=nn.functional.cross_entropy(logits.flatten(0, 1), input_ids.flatten())
        )


def encode_scenes(
    world: World, scenes: Sequence[Scene], *, changed: bool = False
) -> dict[str, Tensor]:
    """pixel_values [rows, 3, 96, 96], and input_ids: the number of each patch's name."""
    numbers = {name: number for number, name in enumerate(world.drawings.all_names, 1)}
    pictures, targets = [], []
    for scene in scenes:
        picture, visible = painted(scene, changed=changed)
        pictures.append(np.asarray(picture))
        of_things = np.array([0, *(numbers[thing.name] for thing in scene.things)])
        targets.append(of_things[patch_things(visible)])
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return {
        "pixel_values": pixels.float() / 127.5 - 1,
        "input_ids": torch.from_numpy(np.stack(targets)),
    }


@torch.no_grad()
def naming(namer: Any, world: World, split: str, n: int = EVALUATED) -> dict[str, dict[str, Any]]:
    """How well things are named: by the name that fits best over the patches that show them [0, 1].

    Only the names that are asked about are compared.

    Args:
        namer: the trained `Namer`.
        world: the world.
        split: "validation" or "test": drawings that training never showed; "calibration": others.
        n: number of scenes of each kind.

    Returns:
        "alone" and "alone, top 5", of things alone in a picture; "scene" of those in scenes of 1 to
        6; "patch" of patches, those without a thing too. Each with mean, standard error, and n,
        over pictures.
    """
    hits: dict[str, list[float]] = {"alone": [], "alone, top 5": [], "scene": [], "patch": []}
    with evaluating(namer):
        for kind, draw in (("alone", world.draw_specimen), ("scene", world.draw_scene)):
            for first in range(0, n, BATCH):
                keys = range(first, min(n, first + BATCH))
                scenes = [world.nth(split, f"naming {kind} {key}", draw) for key in keys]
                batch = encode_scenes(world, scenes)
                logits = namer.logits(batch["pixel_values"])[..., : 1 + len(world.drawings.names)]
                for own, targets in zip(logits, batch["input_ids"], strict=True):
                    _count(hits, kind, own.log_softmax(-1), targets)
    return {name: mean_and_se(values) for name, values in hits.items()}


def _count(hits: dict[str, list[float]], kind: str, logits: Tensor, targets: Tensor) -> None:
    """Add one picture's shares of things that are named rightly."""
    right, in_five = [], []
    for number in targets.unique().tolist():
        if number:
            best = logits[targets == number].mean(0)[1:].topk(5).indices + 1
            right.append(float(best[0] == number))
            in_five.append(float((best == number).any()))
    if right:
        hits[kind].append(sum(right) / len(right))
    if right and kind == "alone":
        hits["alone, top 5"].append(sum(in_five) / len(in_five))
    if kind == "scene":
        hits["patch"].append(float((logits.argmax(-1) == targets).float().mean()))
