"""hipp-ext in vLLM: folders that `save_pruned` wrote are served as they are.

vLLM finds `register` by itself (entry point group `vllm.general_plugins`), in every process that it
starts. After `pip install "hipp-ext[vllm]"`, `vllm serve ./pruned` and `vllm.LLM("./pruned")` work.
Only names are registered: torch, vLLM's models and hipp-ext's core are imported when a model of one
of these architectures is loaded, and a model that was not pruned is built of vLLM's own layers.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from hipp_ext.integrations.vllm_config import SERVED, needs_own_layers

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
    pruned = pruned_vision_blocks(config, folder)
    if not pruned:
        return ()
    return (
        f"The {pruned_parts(pruned)} was pruned ({', '.join(pruned[:3])}, {len(pruned)} blocks in "
        "all), and vLLM builds vision towers and projectors of the configuration's widths. Prune "
        "the language tower alone, or save what pad_to_uniform(model) returns.",
    )


def pruned_vision_blocks(config: Any, folder: Path) -> list[str]:
    """Names of the blocks before the language tower that are narrower than the configuration says.

    Raises:
        CheckpointError: a file of the folder is damaged.
    """
    vision = getattr(config, "vision_config", None)
    if vision is None or not (folder / MANIFEST).is_file():
        return []
    from hipp_ext.kinds import KINDS
    from hipp_ext.model_folder import read_folder

    manifest = read_folder(folder).manifest
    assert manifest is not None
    return [
        group.name
        for group in manifest.groups
        if group.tower != "language"
        and group.width != (group.stock or KINDS[group.kind].common_width(vision, "vision"))
    ]


def pruned_parts(names: Sequence[str]) -> str:
    """What the blocks of these names belong to, in words."""
    words = {"vision": "vision tower", "projector": "projector"}
    return " and ".join(dict.fromkeys(words[name.partition(".")[0]] for name in names))
