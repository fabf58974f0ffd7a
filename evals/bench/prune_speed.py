"""`hipp bench prune`: pruning a 100M-parameter Llama with `hipp_ext.prune` and with torch-pruning's own pruner.

Both remove the same share of FFN channels and KV groups in every layer, ranked by weight magnitude. For torch-pruning
this is its LLM recipe made to work: eager attention, no cache, one head ratio per layer. Each run starts from a fresh copy
of the model, made outside the clock. hipp's time includes finding groups, scoring, planning and slicing.
"""

import copy
import warnings
from typing import Any

import torch
from hipp_ext.evals.bench.measuring import paired_times, ratio, report

from hipp_ext.budget import Bounds, keep_counts
from hipp_ext.errors import MissingExtraError
from hipp_ext.groups import find_groups, tower_layers
from hipp_ext.masks import plan_from_counts
from hipp_ext.scorers import Magnitude
from hipp_ext.surgery import prune

RATIO = 0.25
TOKENS = 16


def llama_100m() -> Any:
    """12 layers, hidden 768, FFN 2048, 12 heads in 12 KV groups, 16k words: 109M parameters, random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = LlamaConfig(
        vocab_size=16_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12,
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def with_hipp(model: Any) -> Any:
    """Groups, magnitude scores, a uniform plan, surgery in place."""
    groups = find_groups(model)
    counts = keep_counts(groups, [0.0] * len(groups), RATIO, Bounds(min_keep=0))
    return prune(model, plan_from_counts(groups, counts, Magnitude()(model)), inplace=True)


def with_torch_pruning(model: Any) -> Any:
    """The stock pruner: trace, group, score, prune."""
    try:
        import torch_pruning as tp
    except ModuleNotFoundError:
        raise MissingExtraError("torch-pruning", "bench") from None
    warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
    layers: list[Any] = list(tower_layers(model, "language"))
    attentions: list[Any] = [layer.self_attn for layer in layers]
    make: Any = tp.pruner.BasePruner
    pruner = make(
        model, {"input_ids": torch.ones(1, TOKENS, dtype=torch.long), "use_cache": False},
        importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.0,
        pruning_ratio_dict={m: RATIO for layer, a in zip(layers, attentions, strict=True) for m in (layer.mlp.gate_proj, a)},
        head_pruning_ratio_dict=dict.fromkeys(attentions, RATIO),
        num_heads={p: 12 for a in attentions for p in (a.q_proj, a.k_proj, a.v_proj)},
        prune_num_heads=True, prune_head_dims=False, ignored_layers=[model.lm_head, model.model.embed_tokens],
        output_transform=lambda out: out.logits, in_channel_groups={}, out_channel_groups={},
    )  # fmt: skip
    pruner.step()
    return model


def run(repeats: int = 5, save: bool = False) -> dict[str, Any]:
    """Time both; returns and prints the result."""
    model = llama_100m()
    dense = sum(p.numel() for p in model.parameters())
    left = {f.__name__: sum(p.numel() for p in f(copy.deepcopy(model)).parameters()) for f in (with_hipp, with_torch_pruning)}
    copies = {name: [copy.deepcopy(model) for _ in range(repeats + 1)] for name in ("hipp", "torch-pruning")}
    times = paired_times(
        {
            "hipp": lambda: with_hipp(copies["hipp"].pop()),
            "torch-pruning": lambda: with_torch_pruning(copies["torch-pruning"].pop()),
        },
        repeats,
    )
    values = {
        "parameters": {"dense": dense, "hipp": left["with_hipp"], "torch-pruning": left["with_torch_pruning"]},
        "torch-pruning / hipp": ratio(times, "torch-pruning", "hipp"), "target": 5, "seconds": times,
    }  # fmt: skip
    return report("prune_speed", f"hipp bench prune --repeats {repeats}", values, save)
