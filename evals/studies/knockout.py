"""Does visual sensitivity rank layers as cutting their view of the picture does?

The reference is causal: in one layer, text tokens may no longer attend to picture tokens
(attention knockout, arXiv 2411.18620), and the KL divergence of the answers from the dense model's
is measured. Visual sensitivity needs one pass for all layers and no intervention; the rank
correlation over layers shows how well it approximates the reference.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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
    causal = torch.ones(length, length, dtype=torch.bool, device=picture.device).tril()
    seen = causal & valid[:, None, :] & ~(picture[:, None, :] & ~picture[:, :, None])
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
    mean, names = effect.mean(0), [g.name for g in groups if g.kind == "attention"]

    def by_layer(scores: Mapping[str, Tensor]) -> list[float]:
        return [float(scores[name].sum()) for name in names]

    scorer = VisualSensitivity()
    whole = by_layer(scorer(model, batches, groups=groups))
    per_batch = [
        rank_correlation(by_layer(scorer(model, [batch], groups=groups)), row)
        for batch, row in zip(batches, effect, strict=True)
    ]
    values = {
        "rows": BATCHES * ROWS,
        "layers": len(names),
        "knockout_kl": mean.tolist(),
        "knockout_kl_se": (effect.std(0, ddof=1) / len(effect) ** 0.5).tolist(),
        "visual_sensitivity": whole,
        "spearman": rank_correlation(whole, mean),
        "spearman_per_batch": mean_and_se(per_batch),
        "spearman_of_wanda_sp": rank_correlation(by_layer(WandaSP()(model, batches)), mean),
    }
    return report("knockout", values, save)


if __name__ == "__main__":
    run_command(run)
