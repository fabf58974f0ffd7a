"""Tiny models that vLLM's CPU kernels can serve (heads of 32), with processors for those that see.

Weights are random, pictures are random dots, and words are numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

WORDS = [f"w{i}" for i in range(40)]
PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"


def noisy(model: Any, seed: int = 0) -> Any:
    """`model` in eval mode with weights that are not near zero, so that a wrong slice shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tokenizer(*special: str, **extra: Any) -> Any:
    """Words of `WORDS`, one token each; `special` are the model's own marks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([PAD, BOS, EOS, UNKNOWN, *special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=256,
        **extra,
    )


def texts(count: int = 20, vocab: int = 97) -> list[list[int]]:
    """Prompts of token ids, of 5 to 29 tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(5, 30, (count,), generator=generator).tolist()
    return [torch.randint(4, vocab, (n,), generator=generator).tolist() for n in lengths]


def questions(
    mark: str, size: int, count: int = 20, vocabulary: Sequence[str] = WORDS
) -> list[tuple[str, Image.Image]]:
    """(text that begins with the image's mark, picture of `size` x `size` px)."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        words = " ".join(random.choice(vocabulary, random.integers(3, 12)))
        pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        found.append((f"{mark} {words}", Image.fromarray(pixels)))
    return found


def sizes(**changed: Any) -> dict[str, Any]:
    """Of a language model whose heads do not fill its hidden size."""
    return (
        dict(
            vocab_size=97,
            hidden_size=48,
            intermediate_size=44,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=32,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        | changed
    )


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**sizes()))


def mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**sizes(sliding_window=None)))


def qwen2() -> Any:
    """Its configuration names no head_dim, as on the hub."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    own = sizes(hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
    del own["head_dim"]
    return Qwen2ForCausalLM(Qwen2Config(**own))


def qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**sizes()))


def gemma3_text() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    own = sizes(sliding_window=16, query_pre_attn_scalar=32)
    types = ["sliding_attention", "full_attention"] * 2
    return Gemma3ForCausalLM(Gemma3TextConfig(**own, layer_types=types))


TEXT: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma3_text": gemma3_text,
}
