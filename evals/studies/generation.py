"""What a generation costs: time to the first token, time per further token, peak memory, and the FLOPs of the prompt.

What is timed is transformers' own `generate`, greedy, for a fixed number of new tokens: the first token's time holds the
vision tower and the whole prompt (prefill), each further token is one decoding step with the cache. The models take turns,
run by run, so that whatever else the machine does hits all of them; warm-up runs do not count. On CUDA, times are those of
events in the stream, read after one synchronisation at the end, so that measuring does not stall the pipeline.
Memory is the most that `generate` adds to the weights: the allocator's own peak on CUDA; on a CPU the growth of the
process, each model in a process of its own (Linux only).
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hipp_ext.calibration import check_processor, encode, find_processor
from hipp_ext.evals.studies.measuring import ratio, resident, spending
from hipp_ext.evals.studies.shapes import noise
from hipp_ext.surgery.checkpoint import load_pruned

QUESTION = "Is there a cup in the image? Please answer yes or no."


@dataclass(frozen=True, kw_only=True)
class Load:
    """What every model is given to do.

    Attributes:
        rows: prompts at a time.
        tokens: length of the random prompts of a language model; a model that sees gets a picture and a short question.
        new_tokens: tokens generated per run, the first included.
        repeats: runs that count.
        warmup: runs before them.
        seed: of pictures and random prompts.
    """

    rows: int = 1
    tokens: int = 512
    new_tokens: int = 33
    repeats: int = 9
    warmup: int = 2
    seed: int = 0


def measure(
    models: Mapping[str, Any], load: Load, batch: Mapping[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    """Model name -> its figures; the models, all on one device, take turns.

    Args:
        models: in eval mode; the first is what the others are compared with.
        load: what they do.
        batch: inputs for all; None: see `prompts`.

    Returns:
        For each model: parameters, weights_mib, prefill_gflops, prompt_tokens, and as {median, low, high, n} (quartiles)
        prefill_ms and decode_ms (per token); for all but the first also speedups: {median, least, most, n} over the turns.
    """
    inputs = {name: _to(batch or prompts(model, load), model) for name, model in models.items()}
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(load.warmup + load.repeats):
        for name, model in models.items():
            first, *rest = token_seconds(model, inputs[name], load.new_tokens)
            if turn >= load.warmup:
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
                "prefill_speedup": ratio(prefill, dense, name),
                "decode_speedup": ratio(decode, dense, name),
            }
        if model.device.type == "cuda":
            _, spent = spending(
                model.device, lambda m=model, n=name: token_seconds(m, inputs[n], load.new_tokens)
            )
            rows[name]["extra_mib"] = spent["extra_mib"]
    return rows


@torch.inference_mode()
def token_seconds(model: Any, batch: Mapping[str, torch.Tensor], new_tokens: int) -> list[float]:
    """Seconds to the first token, then from each token to the next, of one greedy generation."""
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
        torch.cuda.synchronize(model.device)  # nothing of an earlier run may reach into this one
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
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
        return [a.elapsed_time(b) / 1000 for a, b in zip(moments, moments[1:], strict=False)]
    return [b - a for a, b in zip(moments, moments[1:], strict=False)]


def prompts(model: Any, load: Load) -> dict[str, torch.Tensor]:
    """One batch: a picture of noise and `QUESTION` for a model that sees, random tokens for one that does not."""
    generator = torch.Generator().manual_seed(load.seed)
    if not hasattr(model.config, "vision_config"):
        words = model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(3, words, (load.rows, load.tokens), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    from PIL import Image

    processor = find_processor(model)
    check_processor(model, processor)
    noise = torch.randint(0, 256, (336, 336, 3), generator=generator, dtype=torch.uint8)
    picture = Image.fromarray(noise.numpy())
    return encode(processor, [QUESTION] * load.rows, [picture] * load.rows)


def _to(batch: Mapping[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    return {
        k: v.to(model.device, model.dtype if v.is_floating_point() else v.dtype)
        for k, v in batch.items()
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles [ms] of the runs."""
    low, middle, high = (
        statistics.quantiles(seconds, n=4, method="inclusive")
        if len(seconds) > 1
        else [seconds[0]] * 3
    )
    return {"median": 1000 * middle, "low": 1000 * low, "high": 1000 * high, "n": len(seconds)}


def shaped_batch(load: Load) -> dict[str, torch.Tensor]:
    """A batch for the models of `shaped_folders`: one picture of 576 tokens and 60 tokens of text per row."""
    (batch,) = noise(load.rows, at_once=load.rows)
    return batch


# ------------------------------------------------------------------------------------------------------ memory and FLOPs


def weights_mib(model: Any) -> float:
    """Parameters and buffers [MiB]; tied ones once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values()) / 2**20


def own_extra_mib(
    folder: str | Path, load: Load, dtype: str | None = None, *, shaped: bool = False
) -> float:
    """The most that a generation adds to this process [MiB], for a process that does nothing else; NaN where there is no /proc.

    Weights are touched first, since they are mapped from the file; so is the code, by a generation of two tokens.
    """
    model = load_pruned(folder, dtype=getattr(torch, dtype) if dtype else None)
    batch = _to(shaped_batch(load) if shaped else prompts(model, load), model)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.sum()
    token_seconds(model, {"input_ids": torch.ones(1, 4, dtype=torch.long)}, 2)
    before = resident("VmRSS", reset=True)
    token_seconds(model, batch, load.new_tokens)
    return resident("VmHWM") - before


def forked(folders: Sequence[str], load: Load, dtype: str | None, shaped: bool) -> list[float]:
    """`own_extra_mib` of each folder, each in a fork of this process, which must not have computed anything yet."""
    import os

    found = []
    for folder in folders:
        reader, writer = os.pipe()
        if not (child := os.fork()):
            os.write(writer, str(own_extra_mib(folder, load, dtype, shaped=shaped)).encode())
            os._exit(0)
        os.close(writer)
        os.waitpid(child, 0)
        with os.fdopen(reader) as answer:
            found.append(float(answer.read() or "nan"))
    return found


def extra_mib_on_cpu(
    folders: Sequence[Path], load: Load, dtype: str | None, *, shaped: bool
) -> list[float]:
    """The most that a generation adds to a process that holds the model [MiB]; NaN where there is no /proc."""
    if not Path("/proc/self/clear_refs").exists():
        return [float("nan")] * len(folders)
    code = f"from {__name__} import Load, forked; print(forked({[str(f) for f in folders]!r}, {load!r}, {dtype!r}, {shaped}))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    found = done.stdout.splitlines()[-1:] if not done.returncode else []
    if not found or "nan" in found[0]:
        raise RuntimeError(f"the memory of {folders} could not be measured:\n{done.stderr[-2000:]}")
    return json.loads(found[0])


@torch.inference_mode()
def prefill_gflops(model: Any, batch: Mapping[str, torch.Tensor]) -> float:
    """Floating-point operations of one forward pass over the prompt [1e9]; all pairs of tokens count in attention."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    kernel: Any = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    )  # FlopCounterMode knows CUDA's only
    with FlopCounterMode(display=False, custom_mapping={kernel: cpu_attention}) as counter:
        model(**batch, use_cache=False, logits_to_keep=1)
    return counter.get_total_flops() / 1e9
