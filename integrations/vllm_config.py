"""What the configuration of a pruned model says of its layers, as vLLM needs to know it."""

import copy
from typing import Any

_LLAVA_TOWERS = ("llama", "mistral", "qwen2", "qwen3")
# Architecture in config.json -> the types of language towers that are served under it.
SERVED = {
    "LlamaForCausalLM": ("llama",),
    "MistralForCausalLM": ("mistral",),
    "Qwen2ForCausalLM": ("qwen2",),
    "Qwen3ForCausalLM": ("qwen3",),
    "Gemma3ForCausalLM": ("gemma3_text",),
    "LlavaForConditionalGeneration": _LLAVA_TOWERS,
    "LlavaNextForConditionalGeneration": _LLAVA_TOWERS,
    "LlavaOnevisionForConditionalGeneration": _LLAVA_TOWERS,
    "InternVLForConditionalGeneration": _LLAVA_TOWERS,
    "Qwen2VLForConditionalGeneration": ("qwen2_vl_text",),
    "Qwen2_5_VLForConditionalGeneration": ("qwen2_5_vl_text",),
    "Qwen3VLForConditionalGeneration": ("qwen3_vl_text",),
    "Idefics3ForConditionalGeneration": ("llama",),
    "SmolVLMForConditionalGeneration": ("llama",),
    "Gemma3ForConditionalGeneration": ("gemma3_text",),
}


def layer_config(config: Any, layer: int) -> Any:
    """A copy of the configuration of a language tower, as it is for one of its layers.

    Its `head_dim` is that of the dense model, which vLLM would otherwise derive from the number of
    heads that are left. `skip` lists the blocks of the layer that were dropped.
    """
    heterogeneous = getattr(config, "is_heterogeneous", False)
    own = config.per_layer_config[layer] if heterogeneous else copy.copy(config)
    own.head_dim = head_dim(config)
    own.skip = list(getattr(own, "skip", None) or ())
    return own


def head_dim(config: Any) -> int:
    """Size of a head, the same in all layers."""
    values = vars(config)  # a heterogeneous configuration refuses some values as attributes
    return values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]


def needs_own_layers(config: Any) -> bool:
    """Whether vLLM would build other layers than `config` of a language tower describes.

    Where layers differ, and where Qwen2 has fewer heads than its hidden size is made of: vLLM
    derives the size of a head from their number there.
    """
    values = vars(config)
    if getattr(config, "is_heterogeneous", False):
        return True
    return (
        config.model_type.startswith("qwen2")
        and head_dim(config) * values["num_attention_heads"] != values["hidden_size"]
    )


def undivided(config: Any, ranks: int) -> list[str]:
    """What `ranks` GPUs of tensor parallelism do not divide, one line per layer."""
    found = []
    for layer in range(config.num_hidden_layers):
        own = layer_config(config, layer)
        heads, kv_heads = own.num_attention_heads, own.num_key_value_heads
        lines = []
        if "attention" not in own.skip and (
            heads % ranks or (kv_heads % ranks and ranks % kv_heads)
        ):
            lines.append(f"{heads} query heads and {kv_heads} KV heads")
        if "mlp" not in own.skip and own.intermediate_size % ranks:
            lines.append(f"{own.intermediate_size} FFN channels")
        if lines:
            found.append(f"layer {layer} has {', '.join(lines)}")
    return found
