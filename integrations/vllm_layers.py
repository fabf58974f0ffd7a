"""Decoder layers of vLLM that are as wide as their own layer's configuration says, and may lack
blocks.
"""
# pyright: reportMissingImports=false

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.models.utils import extract_layer_index

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.integrations.vllm import MANIFEST, refusals
from hipp_ext.integrations.vllm_config import layer_config, needs_own_layers, undivided


def per_layer(stock: Any) -> Any:
    """vLLM's decoder layer `stock`, built from the configuration of its layer.

    A dropped block is built and thrown away again, so that nothing of how vLLM builds layers has to
    be known here; that takes the memory of one block for a moment.
    """

    class PerLayer(stock):
        def __init__(
            self,
            config: Any = None,
            cache_config: Any = None,
            quant_config: Any = None,
            *,
            prefix: str = "",
            vllm_config: Any = None,
        ):
            config = config or vllm_config.model_config.hf_config
            own = layer_config(config, extract_layer_index(prefix))
            if vllm_config is not None:  # Llama, Mistral
                super().__init__(vllm_config=vllm_config, prefix=prefix, config=own)
            else:
                super().__init__(
                    config=own, cache_config=cache_config, quant_config=quant_config, prefix=prefix
                )
            drop(self, own.skip, prefix)

    PerLayer.__name__ = PerLayer.__qualname__ = stock.__name__
    return PerLayer


def drop(layer: nn.Module, skip: list[str], prefix: str) -> None:
    """Take the blocks that `skip` names, and the norms that serve them alone, out of a layer."""
    sandwiched = hasattr(layer, "pre_feedforward_layernorm")  # norms behind each block, too: Gemma
    if "attention" in skip:
        layer.input_layernorm, layer.self_attn = NoNorm(), NoBlock()
        if sandwiched:
            layer.post_attention_layernorm = nn.Identity()
        # Otherwise it would be given a KV cache.
        get_current_vllm_config().compilation_config.static_forward_context.pop(
            f"{prefix}.self_attn.attn"
        )
    if "mlp" in skip:
        layer.mlp = NoBlock()
        if sandwiched:
            layer.pre_feedforward_layernorm = NoNorm()
            layer.post_feedforward_layernorm = nn.Identity()
        else:
            layer.post_attention_layernorm = NoNorm()


class NoBlock(nn.Module):
    """In a dropped block's place: passes on what `NoNorm` gave it."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden_states


class NoNorm(nn.Module):
    """In the place of a dropped block's norm.

    vLLM's layers hand on what the last block added and the sum before it, and norms add the two.
    Here they stay apart; without a sum yet, nothing was added to what becomes it.
    """

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        return torch.zeros_like(hidden_states) if residual is None else (hidden_states, residual)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside the block, attribute `name` of a module or class of vLLM is `value`."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def pruned_tower(vllm_config: Any) -> bool:
    """Whether a model's language tower has to be built of `per_layer` layers.

    Raises:
        UnsupportedModelError: the model cannot be served, or not with so many ranks of tensor
            parallelism.
        CheckpointError: a file of its folder is damaged.
    """
    model = vllm_config.model_config
    if (Path(model.model) / MANIFEST).is_file():
        config = AutoConfig.from_pretrained(model.model, local_files_only=True)
        if found := refusals(config, model.model):
            raise UnsupportedModelError(f"vLLM cannot serve {model.model}. {' '.join(found)}")
    text = model.hf_config.get_text_config()
    if not needs_own_layers(text):
        return False
    ranks = get_tensor_model_parallel_world_size()
    if found := undivided(text, ranks):
        more = f", and {len(found) - 3} more layers" if len(found) > 3 else ""
        raise UnsupportedModelError(
            f"{model.model} cannot be served with tensor_parallel_size={ranks}, which does not "
            f"divide its widths: {'; '.join(found[:3])}{more}. Choose a tensor_parallel_size that "
            "divides them, choose pipeline_parallel_size instead, or prune with a round_to and "
            "heads that it divides."
        )
    return True
