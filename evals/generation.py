"""What a generation costs: first-token time, time per further token, and the prompt's FLOPs.

transformers' own greedy `generate` is timed for a fixed number of new tokens. The first token's
time covers the vision tower and the whole prompt (prefill); each further token is one decoding
step with the cache. The models take turns, run by run, so that the machine's load affects all of
them alike; warm-up runs do not count. On CUDA, times come from events in the stream, which are
read after one synchronisation at the end, so that measuring does not stall the pipeline.
"""

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hipp_ext.calibration import check_processor, encode, find_processor
from hipp_ext.evals.measuring import paired_ratio, timed
from hipp_ext.limits import weight_bytes

QUESTION = "Is there a cup in the image? Please answer yes or no."


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The generation that is measured.

    Attributes:
        rows: number of prompts in the batch.
        tokens: length of the random prompts of a language model. A vision-language model gets a
            picture and a short question instead.
        new_tokens: number of tokens generated per run, the first included.
        repeats: number of runs that count.
        warmup: number of runs before them.
        seed: random seed of pictures and prompts.
        quick: whether this is a first look, with few and short runs.
    """

    rows: int = 1
    tokens: int = 512
    new_tokens: int = 33
    repeats: int = 9
    warmup: int = 2
    seed: int = 0
    quick: bool = False


def measure(
    models: Mapping[str, Any], workload: Workload, batch: Mapping[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    """Model name -> its figures.

    Args:
        models: models in eval mode, all on one device; the others are compared with the first.
        workload: what every model generates.
        batch: inputs of all models; None: see `prompts`.

    Returns:
        For each model: parameters, weights_mib, prefill_gflops, prompt_tokens, and prefill_ms and
        decode_ms (per token), each as {median, low, high, n} with the quartiles as low and high.
        For all but the first also prefill_speedup and decode_speedup over the first, each as
        {median, least, most, n} over the turns. On CUDA also extra_mib: see `timed`.
    """
    inputs = {name: place(batch or prompts(m, workload), m) for name, m in models.items()}
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(workload.warmup + workload.repeats):
        for name, model in models.items():
            first, *rest = token_seconds(model, inputs[name], workload.new_tokens)
            if turn >= workload.warmup:
                prefill[name].append(first)
                decode[name].append(statistics.fmean(rest))
    dense = next(iter(models))
    rows: dict[str, Any] = {}
    for name, model in models.items():
        rows[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "weights_mib": weights_mib(model),
            "prompt_tokens": inputs[name]["input_ids"].shape[1],
            "prefill_gflops": prefill_gflops(model, inputs[name]),
            "prefill_ms": _spread(prefill[name]),
            "decode_ms": _spread(decode[name]),
        }
        if name != dense:
            rows[name] |= {
                "prefill_speedup": paired_ratio(prefill, dense, name),
                "decode_speedup": paired_ratio(decode, dense, name),
            }
        if model.device.type == "cuda":
            _, cost = timed(
                model.device,
                lambda m=model, n=name: token_seconds(m, inputs[n], workload.new_tokens),
            )
            rows[name]["extra_mib"] = cost["extra_mib"]
    return rows


@torch.inference_mode()
def token_seconds(model: Any, batch: Mapping[str, torch.Tensor], new_tokens: int) -> list[float]:
    """Times of one greedy generation [s]: to the first token, then from each token to the next."""
    from transformers import StoppingCriteriaList

    moments: list[Any] = []

    def now() -> Any:
        if model.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def after_token(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        moments.append(now())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)  # earlier runs must have ended
    moments.append(now())
    criteria = StoppingCriteriaList()
    criteria.append(after_token)  # type: ignore[arg-type]
    model.generate(
        **batch,
        stopping_criteria=criteria,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=0,
    )
    pairs = itertools.pairwise(moments)
    if model.device.type != "cuda":
        return [b - a for a, b in pairs]
    torch.cuda.synchronize(model.device)
    return [a.elapsed_time(b) / 1000 for a, b in pairs]


def prompts(model: Any, workload: Workload) -> dict[str, torch.Tensor]:
    """One batch: a noise picture and `QUESTION` for a VLM, random tokens for a language model."""
    generator = torch.Generator().manual_seed(workload.seed)
    if not hasattr(model.config, "vision_config"):
        vocabulary = model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(3, vocabulary, (workload.rows, workload.tokens), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    from PIL import Image

    processor = find_processor(model)
    check_processor(model, processor)
    pixels = torch.randint(0, 256, (336, 336, 3), generator=generator, dtype=torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    return encode(processor, [QUESTION] * workload.rows, [picture] * workload.rows)


def place(batch: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """`batch` on the model's device, its floating-point tensors in the model's dtype.

    Some processors add values that are no tensors; these stay as they are.
    """
    return {
        k: v.to(model.device, model.dtype if v.is_floating_point() else v.dtype)
        if isinstance(v, torch.Tensor)
        else v
        for k, v in batch.items()
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the runs [ms]."""
    low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    return {"median": 1000 * middle, "low": 1000 * low, "high": 1000 * high, "n": len(seconds)}


def weights_mib(model: Any) -> float:
    """Size of parameters and buffers [MiB]; tied ones count once."""
    return weight_bytes(model) / 2**20


@torch.inference_mode()
def prefill_gflops(model: Any, batch: Mapping[str, torch.Tensor]) -> float:
    """FLOPs of one forward pass over the prompt [1e9]; attention counts all pairs of tokens."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    # FlopCounterMode only knows the CUDA kernels.
    kernel: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: cpu_attention}) as counter:
        model(**batch, use_cache=False, logits_to_keep=1)
    return counter.get_total_flops() / 1e9
