"""Language models of vLLM whose layers differ in width, registered by `hipp_ext.integrations.vllm`.

Each is vLLM's own class. For a pruned model it builds `per_layer` layers in place of its own ones.
"""
# pyright: reportMissingImports=false

import functools
from typing import Any

from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models import gemma3, llama, mistral, qwen2, qwen3

from hipp_ext.integrations.vllm_layers import per_layer, pruned_tower, replaced

LlamaLayer = per_layer(llama.LlamaDecoderLayer)
MistralLayer = per_layer(mistral.MistralDecoderLayer)
Qwen3Layer = per_layer(qwen3.Qwen3DecoderLayer)
Gemma3Layer = per_layer(gemma3.Gemma3DecoderLayer)


class LlamaForCausalLM(llama.LlamaForCausalLM):
    """Llama, also as the language tower of LLaVA and others."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        layers = {"layer_type": LlamaLayer} if pruned_tower(vllm_config) else {}
        super().__init__(vllm_config=vllm_config, prefix=prefix, **layers)


class MistralForCausalLM(mistral.MistralForCausalLM):
    """Mistral."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        layers = {"layer_type": MistralLayer} if pruned_tower(vllm_config) else {}
        super().__init__(vllm_config=vllm_config, prefix=prefix, **layers)


class Qwen2Attention(qwen2.Qwen2Attention):
    """Attention of Qwen2 with a head_dim of its own, where vLLM derives it from the heads."""

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int,
        quant_config: Any = None,
        prefix: str = "",
        **options: Any,
    ):
        super().__init__(
            num_heads * head_dim,
            num_heads=num_heads,
            quant_config=quant_config,
            prefix=prefix,
            **options,
        )
        self.hidden_size = hidden_size
        self.qkv_proj = QKVParallelLinear(
            hidden_size,
            head_dim,
            num_heads,
            self.total_num_kv_heads,
            bias=True,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            num_heads * head_dim,
            hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )


class _Qwen2Layer(qwen2.Qwen2DecoderLayer):
    def __init__(self, config: Any, **options: Any):
        attention = functools.partial(Qwen2Attention, head_dim=config.head_dim)
        with replaced(qwen2, "Qwen2Attention", attention):
            super().__init__(config, **options)


Qwen2Layer = per_layer(_Qwen2Layer)


class Qwen2ForCausalLM(qwen2.Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5, also as the language tower of Qwen2-VL, Qwen2.5-VL and others."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        if not pruned_tower(vllm_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            return
        model = functools.partial(qwen2.Qwen2Model, decoder_layer_type=Qwen2Layer)
        with replaced(qwen2, "Qwen2Model", model):
            super().__init__(vllm_config=vllm_config, prefix=prefix)


class Qwen3ForCausalLM(qwen3.Qwen3ForCausalLM):
    """Qwen3."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        layer = Qwen3Layer if pruned_tower(vllm_config) else qwen3.Qwen3DecoderLayer
        with replaced(qwen3.Qwen3Model, "decoder_layer_type", layer):
            super().__init__(vllm_config=vllm_config, prefix=prefix)


class Gemma3ForCausalLM(gemma3.Gemma3ForCausalLM):
    """Gemma 3, also as the language tower of the model that sees."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        layer = Gemma3Layer if pruned_tower(vllm_config) else gemma3.Gemma3DecoderLayer
        with replaced(gemma3, "Gemma3DecoderLayer", layer):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
