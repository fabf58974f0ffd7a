"""Qwen3-VL in vLLM, whose language tower is not taken from the registry of models."""
# pyright: reportMissingImports=false

from typing import Any

from vllm.model_executor.models import qwen3_vl

from hipp_ext.integrations.vllm_layers import per_layer, pruned_tower, replaced

Layer = per_layer(qwen3_vl.Qwen3VLDecoderLayer)


class Qwen3VLForConditionalGeneration(qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL."""

    def __init__(self, *, vllm_config: Any, prefix: str = "model"):
        layer = Layer if pruned_tower(vllm_config) else qwen3_vl.Qwen3VLDecoderLayer
        with replaced(qwen3_vl.Qwen3LLMModel, "decoder_layer_type", layer):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
