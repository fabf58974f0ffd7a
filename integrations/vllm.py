"""hipp-ext in vLLM: folders that `save_pruned` wrote are served as they are.

vLLM finds `register` by itself (entry point group `vllm.general_plugins`), in every process that it
starts. After `pip install "hipp-ext[vllm]"`, `vllm serve ./pruned` and `vllm.LLM("./pruned")` work.
Only names are registered: torch, vLLM's models and hipp-ext's core are imported when a model of one
of these architectures is loaded, and a model that was not pruned is built of vLLM's own layers.
"""

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["refusals", "register"]

MANIFEST = "hipp_ext.json"  # as in hipp_ext.model_folder, which is not imported before it is needed
_PLACE = "hipp_ext.integrations"
# Architecture in vLLM's registry -> module and class. Other models take their language tower from
# the registry: LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, InternVL, Gemma 3.
CLASSES = {
    "LlamaForCausalLM": f"{_PLACE}.vllm_models:LlamaForCausalLM",
    "MistralForCausalLM": f"{_PLACE}.vllm_models:MistralForCausalLM",
    "Qwen2ForCausalLM": f"{_PLACE}.vllm_models:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": f"{_PLACE}.vllm_models:Qwen3ForCausalLM",
    "Gemma3ForCausalLM": f"{_PLACE}.vllm_models:Gemma3ForCausalLM",
    "Qwen3VLForConditionalGeneration": f"{_PLACE}.vllm_qwen3_vl:Qwen3VLForConditionalGeneration",
    "Idefics3ForConditionalGeneration": f"{_PLACE}.vllm_idefics3:Idefics3ForConditionalGeneration",
    "SmolVLMForConditionalGeneration": f"{_PLACE}.vllm_idefics3:SmolVLMForConditionalGeneration",
}
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


def register() -> None:
    """Register the per-layer models with vLLM, by name, in place of its own of the same names.

    Raises:
        MissingExtraError: vLLM is not installed.
    """
    try:
        registry = import_module("vllm").ModelRegistry
    except ModuleNotFoundError as error:
        from hipp_ext.errors import MissingExtraError

        raise MissingExtraError(error.name or "vllm", "vllm") from error
    for architecture, where in CLASSES.items():
        registry.register_model(architecture, where)


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


def refusals(config: Any, folder: str | Path | None = None) -> tuple[str, ...]:
    """Why vLLM with this plug-in cannot serve a model folder; empty where it can.

    Reads no weights and needs no vLLM. An unpruned model is left to vLLM.

    Args:
        config: the folder's configuration, from transformers' `AutoConfig.from_pretrained`.
        folder: the folder; None: the one that `config` was loaded from.

    Raises:
        CheckpointError: a file of the folder is damaged.
    """
    place = Path(folder or getattr(config, "name_or_path", "") or ".")
    if not needs_own_layers(config.get_text_config()):
        return _vision_refusals(config, place)
    return (*_language_refusals(config), *_vision_refusals(config, place))


def _language_refusals(config: Any) -> tuple[str, ...]:
    text, what_to_do = config.get_text_config(), "Save what pad_to_uniform(model) returns instead."
    architecture = (config.architectures or ["A model without a named architecture"])[0]
    if text.model_type not in SERVED.get(architecture, ()):
        return (
            f"{architecture} with a language tower of type {text.model_type!r} is not among the "
            "models whose layers may differ in width in vLLM with hipp-ext: "
            f"{', '.join(SERVED)}. {what_to_do}",
        )
    activation = vars(text).get("hidden_act", "silu")
    if activation != "silu":
        return (
            f"The FFN activation is {activation!r}; vLLM's {text.model_type} knows 'silu' only.",
        )
    return ()


def _vision_refusals(config: Any, folder: Path) -> tuple[str, ...]:
    """vLLM builds vision towers with one width, that of the configuration."""
    vision = getattr(config, "vision_config", None)
    if vision is None or not (folder / MANIFEST).is_file():
        return ()
    from hipp_ext.kinds import KINDS
    from hipp_ext.model_folder import read_folder

    manifest = read_folder(folder).manifest
    assert manifest is not None
    pruned = [
        group.name
        for group in manifest.groups
        if group.tower == "vision"
        and group.width != KINDS[group.kind].common_width(vision, "vision")
    ]
    if not pruned:
        return ()
    return (
        f"The vision tower was pruned ({', '.join(pruned[:3])}, {len(pruned)} blocks in all), and "
        "vLLM builds vision towers of one width. Prune the language tower alone, or save what "
        "pad_to_uniform(model) returns.",
    )
