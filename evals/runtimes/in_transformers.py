"""transformers' own `generate`, on models that `load_pruned` loads."""

import statistics
from typing import TYPE_CHECKING, Any

import torch

from hipp_ext.evals.generation import token_seconds
from hipp_ext.surgery.checkpoint import load_pruned

if TYPE_CHECKING:
    from hipp_ext.evals.runtimes import Serving
    from hipp_ext.evals.runtimes.worker import Generate

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def prepare(folder: str, serving: "Serving") -> str:
    """The folder itself."""
    torch.set_num_threads(serving.threads)
    return folder


def load(folder: str, serving: "Serving") -> "Generate":
    """A function (token ids, new tokens) -> (seconds to the first, seconds per further token)."""
    model: Any = load_pruned(folder, dtype=DTYPES[serving.weights or "f32"])

    def generate(ids: Any, new_tokens: int) -> tuple[float, float]:
        batch = {"input_ids": torch.tensor([ids])}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        first, *rest = token_seconds(model, batch, new_tokens)
        return first, statistics.fmean(rest)

    return generate
