"""Training of the testbed's model from nothing, in minutes on two CPU cores.

First the vision tower learns to name the object in each cell. Then the language model reads facts
until it knows them, which takes several times longer together with other data. Then the whole model
learns from conversations: see `conversations.py`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hipp_ext.files import new_folder
from hipp_ext.progress import progress_bar
from hipp_ext.testbed import world
from hipp_ext.testbed.conversations import (
    balanced,
    captions,
    checks,
    choosing,
    collate,
    mostly_yes,
    pixel_values,
    reading,
    with_prior,
)
from hipp_ext.testbed.model import EMPTY, build_model, build_processor, use_hub_names
from hipp_ext.training import lr_factor, make_optimizers, step_optimizers

LR, MUON_LR = 2e-3, 0.02  # peak learning rates
Sources = Sequence[tuple[Callable, int]]  # (source of conversations, rows per step)
FACTS: Sources = ((reading, 16),)
ALL: Sources = ((checks, 12), (balanced, 14), (captions, 8), (reading, 8), (choosing, 8))
PRIOR: Sources = ((checks, 10), (with_prior, 32), (captions, 4), (reading, 2), (choosing, 6))
MOSTLY_YES: Sources = ((checks, 10), (mostly_yes, 32), (captions, 4), (reading, 2), (choosing, 6))


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
    """Train a model and write it, with its processor, to `out_dir`; a failed run leaves nothing.

    Args:
        out_dir: folder for `load`: safetensors and JSON.
        seed: random seed of the parameters and of the order of the data. Equal seeds give equal
            weights on one machine with one number of threads.
        vision_steps, fact_steps, steps: optimizer steps of the stages.
        look_steps: optimizer steps of each of the last two stages, on questions with a language
            prior.
        overwrite: replace an existing folder.
        progress: show progress bars.
        **sizes: sizes of the language model; see `build_model`.

    Returns:
        The losses of each step by stage: "vision", "facts", "language", "prior" and "mostly_yes"
        [nats].

    Raises:
        OutputExistsError: `out_dir` exists and `overwrite` is False.
    """
    model, processor = build_model(seed, **sizes), build_processor()
    _initialise(model, seed)
    stages: tuple[tuple[str, int, Sources, float], ...] = (
        ("facts", fact_steps, FACTS, 1.0),
        ("language", steps, ALL, 1.0),
        ("prior", look_steps, PRIOR, 0.6),
        ("mostly_yes", look_steps, MOSTLY_YES, 0.6),
    )
    with new_folder(out_dir, overwrite) as folder:
        losses = {"vision": _train_vision(model, processor, vision_steps, seed, progress)}
        for number, (name, count, sources, scale) in enumerate(stages):
            with progress_bar(progress, name, count) as show:
                losses[name] = _train_language(
                    model, processor, count, sources, seed + number, scale, show
                )
        model.save_pretrained(folder)
        use_hub_names(folder / "model.safetensors")
        processor.save_pretrained(folder)
    return losses


def _initialise(model: Any, seed: int) -> None:
    """Initialise heads so that they attend to similar tokens: queries and keys start equal.

    Source: Trockman and Kolter, Mimetic Initialization of Self-Attention Layers
        (arXiv 2305.09828), simplified.
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
                    std = 0.08 / (math.sqrt(2 * len(tower.layers)) if residual else 1)
                    weight.normal_(0, std, generator=generator)
            attention = layer.self_attn
            for head in attention.q_proj.weight.split(attention.head_dim):
                random = torch.randn(head.T.shape, generator=generator)
                head.copy_(1.2 * torch.linalg.qr(random)[0].T)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            for projection in (attention.q_proj, attention.k_proj):
                noise = torch.randn(projection.weight.shape, generator=generator)
                projection.weight.add_(noise, alpha=0.03)


def _train_vision(model: Any, processor: Any, steps: int, seed: int, progress: bool) -> list[float]:
    """Train the projected features of each cell to match the word for its object, or for none."""
    import torch

    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    words = model.get_input_embeddings().weight
    ids = processor.tokenizer.convert_tokens_to_ids([EMPTY, *world.OBJECTS])
    scenes = world.stream("train", seed=seed + 1)
    optimizer = torch.optim.AdamW([*tower.parameters(), *projector.parameters(), words], lr=1e-3)
    losses = []
    with progress_bar(progress, "vision", steps) as show:
        for step in range(steps):
            batch = list(itertools.islice(scenes, 64))
            features = model.model.get_image_features(pixel_values(batch)).pooler_output
            logits = torch.cat(list(features)) @ words[ids].T
            targets = torch.tensor([_objects_by_cell(scene) for scene in batch])
            loss = torch.nn.functional.cross_entropy(logits, targets.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            show(step + 1, "")
    return losses


def _objects_by_cell(scene: world.Scene) -> list[int]:
    """For each cell the number of its object, from 1, or 0."""
    names = dict(scene.cells)
    cells = range(world.GRID * world.GRID)
    return [1 + world.OBJECTS.index(names[cell]) if cell in names else 0 for cell in cells]


def _train_language(
    model: Any,
    processor: Any,
    steps: int,
    sources: Sources,
    seed: int,
    scale: float,
    show: Callable[[int, str], None],
) -> list[float]:
    """Train the whole model on `sources` at `scale` times the peak learning rates."""
    import torch

    optimizers = make_optimizers(model, LR, MUON_LR)
    losses = []
    streams = [(make(seed), count) for make, count in sources]
    for step in range(steps):
        total = 0.0
        for source, count in streams:
            loss = model(**collate(processor, list(itertools.islice(source, count)))).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_optimizers(optimizers, scale * lr_factor(step, steps, warmup=30, decay=0.6))
        losses.append(total)
        show(step + 1, f"loss {total:.2f}")
    return losses
