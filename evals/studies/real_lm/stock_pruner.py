"""torch-pruning's own pruner on a Llama, with the settings of its example for language models."""

import copy
import warnings
from typing import Any

import torch
from torch import nn

from hipp_ext.errors import MissingExtraError
from hipp_ext.groups import tower_layers

STEP = 0.005  # of the width ratio that is looked for
TOKENS = 8


def prune_stock(model: Any, pruning_ratio: float) -> Any:
    """A copy of `model` of whose layers torch-pruning removed at least `pruning_ratio`.

    Group magnitudes decide. FFN channels, query heads and channels of the residual stream leave in
    the same proportion everywhere, the least one that suffices; the embeddings lose their channels
    too, which does not count.

    Source: examples/LLMs/prune_llm.py of torch-pruning.
    Differs from it: eager attention and no cache, because tracing does not end with them.
    """
    width_ratio = _width_ratio(model.config, pruning_ratio)
    return _pruned(copy.deepcopy(model), width_ratio)


def removed(dense: nn.Module, small: nn.Module) -> float:
    """The removed fraction of the parameters of the layers' linear maps."""
    return 1 - _parameters(small) / _parameters(dense)


def _parameters(model: nn.Module) -> int:
    layers = tower_layers(model, "language")
    return sum(m.weight.numel() for m in layers.modules() if isinstance(m, nn.Linear))


def _width_ratio(config: Any, pruning_ratio: float) -> float:
    """The smallest ratio of widths that removes `pruning_ratio` of the parameters of a layer."""
    from transformers import LlamaForCausalLM

    shape = copy.deepcopy(config)
    shape.num_hidden_layers, shape.vocab_size, shape.layer_types = 1, TOKENS, None
    shape.pad_token_id = shape.bos_token_id = shape.eos_token_id = None
    with torch.random.fork_rng():
        layer = LlamaForCausalLM(shape)
    for step in range(1, int(1 / STEP)):
        small = _pruned(copy.deepcopy(layer), step * STEP)
        if removed(layer, small) >= pruning_ratio:
            return step * STEP
    raise AssertionError(f"no width ratio removes {pruning_ratio}")


def _pruned(model: Any, width_ratio: float) -> Any:
    """`model`, pruned in place."""
    try:
        import torch_pruning as tp
    except ModuleNotFoundError:
        raise MissingExtraError("torch-pruning", "studies") from None
    warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
    model.set_attn_implementation("eager")
    config, attentions = model.config, [layer.self_attn for layer in model.model.layers]
    heads = {a.q_proj: config.num_attention_heads for a in attentions}
    heads |= {p: config.num_key_value_heads for a in attentions for p in (a.k_proj, a.v_proj)}
    make: Any = tp.pruner.BasePruner
    pruner = make(
        model,
        {"input_ids": torch.zeros(1, TOKENS, dtype=torch.long), "use_cache": False},
        importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        pruning_ratio=width_ratio,
        head_pruning_ratio=width_ratio,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=[model.lm_head],
        output_transform=lambda out: out.logits,
        round_to=4,
        in_channel_groups={},
        out_channel_groups={},
    )
    pruner.step()
    for a in attentions:
        a.num_key_value_groups = a.q_proj.out_features // a.k_proj.out_features
    model.config.hidden_size = model.lm_head.in_features
    return model
