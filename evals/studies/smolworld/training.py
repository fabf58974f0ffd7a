"""The language model learns to see: adapters on SmolLM2, and the projector."""

from pathlib import Path
from typing import Any

from hipp_ext.evals.studies.smolworld.conversations import Conversations
from hipp_ext.evals.studies.smolworld.factors import FACTORS, tower_of, write_factors
from hipp_ext.recover import RecoverResult, RecoverSettings, recover


def language_settings(
    steps: int, *, lr: float = 1.5e-3, rank: int = 16, vision: bool = False, seed: int = 0
) -> RecoverSettings:
    """The settings of a run.

    Args:
        steps: optimizer steps.
        lr: peak learning rate of adapters and projector.
        rank: rank of the adapters. 16 makes 4.9 million parameters.
        vision: train the tower, too.
        seed: random seed.
    """
    return RecoverSettings(
        steps=steps,
        optimizer="adamw",
        lr=lr,
        schedule="cosine",
        train="lora",
        lora_rank=rank,
        lora_alpha=2.0 * rank,
        whole_modules=("multi_modal_projector", *(["vision_tower"] if vision else [])),
        freeze_vision=not vision,
        precision="bf16",
        compression="none",
        save_every=min(50, steps),
        evaluate_every=max(10, steps // 8),
        keep="last",
        seed=seed,
    )


def train_language(
    model: Any, data: Conversations, settings: RecoverSettings, out: Path
) -> RecoverResult:
    """Train `model` in place; an interrupted run goes on. OUT gets factors.safetensors at the end.

    Args:
        model: LLaVA with a trained tower.
        data: the conversations.
        settings: what `language_settings` returned.
        out: the folder.
    """
    result = recover(model, data, settings, folder=out / "language")
    write_factors(out / "language", out / FACTORS, settings.lora_alpha, tower_of(out))
    return result
