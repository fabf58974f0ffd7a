"""Idefics3 and SmolVLM in vLLM, whose language tower is not taken from the registry of models."""
# pyright: reportMissingImports=false

from typing import Any

from vllm.model_executor.models import idefics3, llama, smolvlm

from hipp_ext.integrations.vllm_layers import per_layer, pruned_tower, replaced

Layer = per_layer(llama.LlamaDecoderLayer)


class Tower(llama.LlamaModel):
    """Llama without its head."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=Layer)


class Idefics3ForConditionalGeneration(idefics3.Idefics3ForConditionalGeneration):
    """Idefics3."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        tower = Tower if pruned_tower(vllm_config) else llama.LlamaModel
        with replaced(idefics3, "LlamaModel", tower):
            super().__init__(vllm_config=vllm_config, prefix=prefix)


class SmolVLMForConditionalGeneration(smolvlm.SmolVLMForConditionalGeneration):
    """SmolVLM."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        tower = Tower if pruned_tower(vllm_config) else llama.LlamaModel
        with replaced(idefics3, "LlamaModel", tower):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
