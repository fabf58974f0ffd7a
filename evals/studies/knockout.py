"""Does visual sensitivity rank layers as cutting their view of the picture does?

The reference is causal: in one layer, text tokens may no longer attend to picture tokens
(attention knockout, arXiv 2411.18620), and the KL divergence of the answers from the dense model's
is measured. Visual sensitivity needs one pass for all layers and no intervention; the rank
correlation over layers shows how well it approximates the reference.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from hipp_ext import testbed
from hipp_ext.calibration import Batch, image_token_id
from hipp_ext.evals.studies.measuring import (
    Save,
    mean_and_se,
    rank_correlation,
    report,
    run_command,
)
from hipp_ext.groups import find_groups, tower_layers
from hipp_ext.scorers import VisualSensitivity, WandaSP
from hipp_ext.scorers.base import valid_tokens

BATCHES, ROWS = 6, 32


@contextlib.contextmanager
def cut_view(model: nn.Module, layer: int, batch: Batch) -> Iterator[None]:
    """Context in which text tokens of `layer` do not see picture tokens; needs sdpa attention."""
    picture, valid = batch["input_ids"] == image_token_id(model), valid_tokens(batch)
    length = picture.shape[1]
    seen = (
        torch.ones(length, length, dtype=torch.bool, device=picture.device).tril()
        & valid[:, None, :]
    )
    seen = seen & ~(picture[:, None, :] & ~picture[:, :, None])
    # Padding sees itself: softmax needs one unmasked token per row.
    seen = seen | torch.eye(length, dtype=torch.bool, device=picture.device)
    module: Any = tower_layers(model, "language")[layer].self_attn

    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"attention_mask": seen[:, None]}

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def knockout(model: nn.Module, batches: Sequence[Batch]) -> np.ndarray:
    """(batches, layers) KL of the answers from dense [nats] when one layer's view is cut."""
    layers = range(len(tower_layers(model, "language")))
    result = np.zeros((len(batches), len(layers)))
    for b, batch in enumerate(batches):
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        first = (batch["labels"] != -100).int().argmax(1) - 1
        rows = torch.arange(len(first))
        dense = model(**inputs).logits[rows, first].log_softmax(-1)
        for layer in layers:
            with cut_view(model, layer, batch):
                cut = model(**inputs).logits[rows, first].log_softmax(-1)
            result[b, layer] = float((dense.exp() * (dense - cut)).sum(-1).mean())
    return result


def run(save: Save = False) -> dict[str, Any]:
    """Compare visual sensitivity with attention knockout, layer by layer, on the testbed.

    Example: `python -m hipp_ext.evals.studies.knockout`
    """
    model, processor = testbed.load()
    groups = find_groups(model)
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    batches = testbed.calibration_batches(processor, BATCHES * ROWS, ROWS)
    effect = knockout(model, batches)
    rows: dict[str, list[float]] = {}
    for b, batch in enumerate(batches):
        scores = VisualSensitivity()(model, [batch], groups=groups)
        attention = [float(scores[g.name].sum()) for g in groups if g.kind == "attention"]
        rows.setdefault("visual sensitivity", []).append(rank_correlation(attention, effect[b]))
    whole = VisualSensitivity()(model, batches, groups=groups)
    by_layer = [float(whole[g.name].sum()) for g in groups if g.kind == "attention"]
    weights = WandaSP()(model, batches)
    plain = [float(weights[g.name].sum()) for g in groups if g.kind == "attention"]
    per_batch = rows["visual sensitivity"]
    values = {
        "rows": BATCHES * ROWS,
        "layers": len(by_layer),
        "knockout_kl": effect.mean(0).tolist(),
        "knockout_kl_se": (effect.std(0, ddof=1) / len(effect) ** 0.5).tolist(),
        "visual_sensitivity": by_layer,
        "spearman": rank_correlation(by_layer, effect.mean(0)),
        "spearman_per_batch": mean_and_se(per_batch),
        "spearman_of_wanda_sp": rank_correlation(plain, effect.mean(0)),
    }
    return report("knockout", values, save)


if __name__ == "__main__":
    run_command(run)
