"""A LLaVA of the small world without any package: a token per letter, random weights."""

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hipp_ext.evals.studies.smolworld.model import (
    REPLACED,
    assemble,
    build_processor,
    vision_config,
)


def letters_processor() -> Any:
    """One token per printable character, and SmolLM2's special ones."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", REPLACED]
    letters = ["\n", *(chr(code) for code in range(32, 127))]
    tokenizer = Tokenizer(BPE({t: i for i, t in enumerate([*special, *letters])}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in special])
    return build_processor(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def language() -> LlamaForCausalLM:
    """A Llama of two layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def llava(processor: Any) -> Any:
    """A LLaVA on that Llama, with a tower of one layer."""
    return assemble(language(), processor, vision_config(hidden=32, layers=1))
