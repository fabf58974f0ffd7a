"""Training of the vision tower and the projector on scenes whose patches have names."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hipp_ext.evals.studies.smolworld.factors import TOWER, tensors_of
from hipp_ext.evals.studies.smolworld.namer import EVALUATED, Namer, encode_scenes, naming
from hipp_ext.evals.studies.smolworld.scenes import World
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import seal
from hipp_ext.recover import RecoverResult, RecoverSettings, recover


class PatchNames:
    """Scenes with the name of each patch, for `recover`; row n is the same in every run.

    Half of the scenes show things that nothing is asked about, a quarter places, and a quarter
    mixtures, where no concept is rare. Shapes and colours change at random.
    """

    def __init__(self, world: World, batch_size: int, seed: int = 0):
        self.world, self.batch_size, self.seed = world, batch_size, seed
        names = list(world.drawings.all_names)
        self.identity = {"names": names, "seed": seed, "batch": batch_size}

    def batches(self, rank: int, workers: int, start: int) -> Iterator[list[dict[str, Tensor]]]:
        """See `DataSource`."""
        for step in itertools.count(start):
            yield [self._batch(step * workers + rank)]

    def _batch(self, number: int) -> dict[str, Tensor]:
        world = self.world
        draws = world.draw_scene, world.draw_others, world.draw_mixture, world.draw_others
        first = number * self.batch_size
        scenes = [
            world.nth("train", f"vision {self.seed} {row}", draws[row % len(draws)])
            for row in range(first, first + self.batch_size)
        ]
        return encode_scenes(world, scenes, changed=True)


def vision_settings(steps: int, *, lr: float = 1e-3, seed: int = 0) -> RecoverSettings:
    """The settings of a run of `steps` optimizer steps with the peak learning rate `lr`."""
    return RecoverSettings(
        steps=steps,
        optimizer="adamw",
        lr=lr,
        schedule="cosine",
        warmup=max(1, min(200, steps // 10)),
        precision="bf16",
        compression="none",
        save_every=min(100, steps),
        evaluate_every=max(10, steps // 8),
        keep="last",
        seed=seed,
    )


def train_vision(
    model: Any,
    processor: Any,
    world: World,
    out: Path,
    settings: RecoverSettings,
    batch_size: int,
    measured: int = EVALUATED,
) -> RecoverResult:
    """Train the tower and the projector of `model` in place; an interrupted run goes on.

    OUT/tower.safetensors gets both. The projector is scaled so that what it returns is as large as
    the embeddings of words.

    Args:
        model, processor, world: what is trained, and on what.
        out: the folder.
        settings: what `vision_settings` returned.
        batch_size: pictures per step.
        measured: scenes of each kind in an evaluation on the validation's drawings.
    """
    namer = Namer(model, processor, world)
    data = PatchNames(world, batch_size, settings.seed)
    result = recover(
        namer,
        data,
        settings,
        folder=out / "vision",
        measure=lambda namer: {
            name: found["mean"]
            for name, found in naming(namer, world, "validation", measured).items()
        },
    )
    _rescale(namer, world)
    write_atomic(out / TOWER, seal(tensors_of(model), {"step": result.step}))
    return result


@torch.no_grad()
def _rescale(namer: Namer, world: World) -> None:
    scenes = list(itertools.islice(world.stream("train"), 64))
    hidden = namer.vision_tower(encode_scenes(world, scenes)["pixel_values"]).last_hidden_state
    size = namer.multi_modal_projector(hidden[:, 1:]).norm(dim=-1).mean()
    for p in namer.multi_modal_projector.linear_2.parameters():
        p.mul_(namer.size / size)
