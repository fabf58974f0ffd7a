"""Time and extra memory of pruning a Llama: hipp_ext.prune against torch-pruning's own pruner.

Both remove the same fraction of FFN channels and KV groups in every layer, ranked by weight
magnitude, in place. For torch-pruning this is its LLM recipe made to work: eager attention, no
cache, one head ratio per layer. Every run has a process of its own, the sides take turns, and the
model is built before the clock starts. hipp's time includes finding groups, scoring, planning and
slicing. Extra memory is the peak above the memory of the dense model's process (Linux only).
"""

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer

from hipp_ext.budget import Bounds, keep_counts
from hipp_ext.errors import MissingExtraError
from hipp_ext.evals.measuring import paired_ratio, resident
from hipp_ext.evals.studies.measuring import Save, report, run_command
from hipp_ext.groups import find_groups, tower_layers
from hipp_ext.scorers import Magnitude
from hipp_ext.surgery.prune import prune
from hipp_ext.units import plan_from_counts

RATIO = 0.25
TOKENS = 16
# Hidden size, intermediate size, layers, heads.
SHAPES = {"100M": (768, 2048, 12, 12), "1B": (2048, 8192, 16, 32)}


def llama(shape: str) -> Any:
    """A random float32 Llama with 16,000 words.

    It has no grouped queries, because the stock torch-pruning cannot remove their heads.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, ffn, layers, heads = SHAPES[shape]
    config: Any = LlamaConfig(
        vocab_size=16_000,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def with_hipp(model: Any) -> Any:
    """Groups, magnitude scores, a uniform plan, surgery in place."""
    groups = find_groups(model)
    counts = keep_counts(groups, None, RATIO, Bounds(min_keep=0))
    return prune(model, plan_from_counts(groups, counts, Magnitude()(model)), inplace=True)


def with_torch_pruning(model: Any) -> Any:
    """The stock pruner: trace, group, score, prune."""
    try:
        import torch_pruning as tp
    except ModuleNotFoundError:
        raise MissingExtraError("torch-pruning", "studies") from None
    warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
    layers: list[Any] = list(tower_layers(model, "language"))
    attentions: list[Any] = [layer.self_attn for layer in layers]
    heads = model.config.num_attention_heads
    make: Any = tp.pruner.BasePruner
    pruner = make(
        model,
        {"input_ids": torch.ones(1, TOKENS, dtype=torch.long), "use_cache": False},
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.0,
        pruning_ratio_dict={
            m: RATIO
            for layer, a in zip(layers, attentions, strict=True)
            for m in (layer.mlp.gate_proj, a)
        },
        head_pruning_ratio_dict=dict.fromkeys(attentions, RATIO),
        num_heads={p: heads for a in attentions for p in (a.q_proj, a.k_proj, a.v_proj)},
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=[model.lm_head, model.model.embed_tokens],
        output_transform=lambda out: out.logits,
        in_channel_groups={},
        out_channel_groups={},
    )
    pruner.step()
    return model


SIDES: dict[str, Callable[[Any], Any]] = {"hipp": with_hipp, "torch-pruning": with_torch_pruning}


def measure(side: str, shape: str) -> dict[str, float]:
    """One run in this process: seconds, extra memory [MiB], parameters before and after."""
    if side == "torch-pruning":
        import torch_pruning  # noqa: F401 (the import is not timed)
    with_hipp(llama("100M")) if shape != "100M" else None  # warms torch up for both sides
    model = llama(shape)
    dense = sum(p.numel() for p in model.parameters())
    before = resident("VmRSS", reset=True)
    start = time.perf_counter()
    small = SIDES[side](model)
    seconds = time.perf_counter() - start
    extra = resident("VmHWM") - before
    left = sum(p.numel() for p in small.parameters())
    return {"seconds": seconds, "extra_mib": extra, "dense": dense, "left": left}


def run(
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each side and shape.")] = 3,
    save: Save = False,
) -> dict[str, Any]:
    """Prune a 100M and a 1B Llama by hipp_ext.prune and by torch-pruning's own pruner.

    The 1B shape needs about 10 GB of memory.

    Example: `python -m hipp_ext.evals.studies.hosts --repeats 5`
    """
    rows: dict[str, Any] = {}
    for shape in SHAPES:
        runs = [{side: _in_own_process(side, shape) for side in SIDES} for _ in range(repeats)]
        times, memory = (
            {side: [run[side][what] for run in runs] for side in SIDES}
            for what in ("seconds", "extra_mib")
        )
        left = {side: runs[0][side]["left"] for side in SIDES}
        rows[shape] = {
            "parameters": {"dense": runs[0]["hipp"]["dense"], **left},
            "time, torch-pruning / hipp": paired_ratio(times, "torch-pruning", "hipp"),
            "extra memory, hipp / torch-pruning": paired_ratio(memory, "hipp", "torch-pruning"),
            "seconds": times,
            "extra_mib": memory,
        }
    values = {"shapes": rows, "target": {"time": 8, "extra memory": 0.5}}
    return report("hosts", values, save)


def _in_own_process(side: str, shape: str) -> dict[str, float]:
    code = (
        "import json; from hipp_ext.evals.studies.hosts import measure; "
        f"print(json.dumps(measure({side!r}, {shape!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{side} failed on the {shape} shape:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    run_command(run)
