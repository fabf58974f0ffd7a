"""Tiny real transformers models, built from configs, every dimension different; and batches that
they accept.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

VOCAB, IMAGE_TOKEN = 97, 5


def _text(cls, layers=3, heads=4, kv_heads=4, hidden=40, ffn=44, head_dim=10, **extra):
    return cls(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **extra,
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(_text(LlamaConfig, heads=6, kv_heads=3, hidden=48, head_dim=8))


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(
        _text(MistralConfig, heads=6, kv_heads=2, hidden=48, head_dim=8, sliding_window=None)
    )


def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(_text(Qwen2Config, kv_heads=2))


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(_text(Qwen3Config, heads=8, kv_heads=4, head_dim=6))


def _clip():
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=32,
        patch_size=8,
    )


def llava(heads: int = 4, kv_heads: int = 4, head_dim: int = 10, layers: int = 3) -> nn.Module:
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = _text(LlamaConfig, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=_clip(), text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=16
        )
    )


def llava_gqa() -> nn.Module:
    return llava(heads=8, kv_heads=2, head_dim=6)


def llava_mqa() -> nn.Module:
    return llava(heads=4, kv_heads=1)


def llava_next() -> nn.Module:
    from transformers import LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config=_clip(),
        text_config=_text(LlamaConfig),
        image_token_id=IMAGE_TOKEN,
        image_grid_pinpoints=[[32, 32]],
    )
    return LlavaNextForConditionalGeneration(config)


def qwen2_5_vl() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=VOCAB,
            hidden_size=40,
            intermediate_size=44,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 2, 2],
            },
        ),
        vision_config=dict(
            depth=2,
            hidden_size=36,
            intermediate_size=52,
            num_heads=3,
            patch_size=4,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=40,
            window_size=16,
            fullatt_block_indexes=[1],
        ),
        image_token_id=IMAGE_TOKEN,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def smolvlm() -> nn.Module:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig

    config = Idefics3Config(
        text_config=_text(LlamaConfig, kv_heads=2).to_dict(),
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
        pad_token_id=0,
        vision_config=dict(
            hidden_size=36,
            intermediate_size=52,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=32,
            patch_size=8,
        ),
    )
    return Idefics3ForConditionalGeneration(config)


SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


def granite_llava() -> nn.Module:
    """Blocks whose output is scaled before it is added."""
    from transformers import GraniteConfig, LlavaConfig, LlavaForConditionalGeneration

    text = GraniteConfig(**SIZES, residual_multiplier=0.3)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=_clip(), text_config=text, image_token_id=IMAGE_TOKEN)
    )


def gemma3() -> nn.Module:
    """Blocks whose output is normed before it is added, and norms that keep their gain less one."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(
        text_config=SIZES | {"sliding_window": 64},
        vision_config=_clip().to_dict(),
        image_token_id=IMAGE_TOKEN,
        mm_tokens_per_image=16,
    )
    return Gemma3ForConditionalGeneration(config)


def mllama() -> nn.Module:
    """A layer that attends to the image's features alone, through gates."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = SIZES | {
        "num_hidden_layers": 3,
        "cross_attention_layers": [1],
        "pad_token_id": 0,
        "rope_parameters": rope,
    }
    vision = dict(
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=3,
        image_size=16,
        patch_size=8,
        vision_output_dim=72,
        intermediate_layers_indices=[0],
        max_num_tiles=1,
        supported_aspect_ratios=[[1, 1]],
    )
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)
    return MllamaForConditionalGeneration(config)


SHARING = SIZES | {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "sliding_window": 64,
    "hidden_size_per_layer_input": 12,
    "vocab_size_per_layer_input": VOCAB,
    "pad_token_id": 0,
}


def gemma3n() -> nn.Module:
    """The last layers attend to keys and values of earlier ones."""
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    extra = dict(laurel_rank=6, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4)
    return Gemma3nForCausalLM(Gemma3nTextConfig(**SHARING, **extra))


def gemma4() -> nn.Module:
    """The same, with heads of different lengths and FFNs of different widths."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    extra = dict(use_double_wide_mlp=True, global_head_dim=10)
    return Gemma4ForCausalLM(Gemma4TextConfig(**SHARING, **extra))


def gemma4_equal() -> nn.Module:
    """Values that are the keys, in some of the layers."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    alone = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
    extra = dict(attention_k_eq_v=True, num_global_key_value_heads=1, global_head_dim=10)
    return Gemma4ForCausalLM(Gemma4TextConfig(**SHARING | alone, **extra))


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "llava": llava,
    "llava_gqa": llava_gqa,
    "llava_mqa": llava_mqa,
    "llava_next": llava_next,
    "qwen2_5_vl": qwen2_5_vl,
    "smolvlm": smolvlm,
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
}
# Enough for a law about towers: the others differ from these by a number of heads or a bias, and
# have every law of the zoo.
VARIED = ("llava_gqa", "llava_next", "qwen2_5_vl", "smolvlm", "llama", "qwen3")
PECULIAR = {
    "granite_llava": granite_llava,
    "gemma3": gemma3,
    "mllama": mllama,
}  # what they do differently is tested where it matters
SHARED_KEYS = {"gemma3n": gemma3n, "gemma4": gemma4, "gemma4_equal": gemma4_equal}
IMAGE_TOKENS = {
    "llava": 16,
    "llava_gqa": 16,
    "llava_mqa": 16,
    "llava_next": 16 + 16 + 4,
    "qwen2_5_vl": 16,
    "smolvlm": 4,
    "mllama": 1,
}


def build(name: str, seed: int = 0) -> nn.Module:
    """The model `name` of these tables in eval mode, random weights by `seed`, biases and
    norms random too.
    """
    torch.manual_seed(seed)
    model = (BUILDERS | PECULIAR | SHARED_KEYS)[name]().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        # Larger than transformers' 0.02, and nowhere exactly 0 or 1, so that a wrong slice shows in
        # the logits.
        parameter.data += 0.15 * torch.randn(parameter.shape, generator=generator)
    return model


def batch(
    name: str, size: int = 2, length: int = 7, seed: int = 0, labels: bool = False
) -> dict[str, torch.Tensor]:
    """A batch for the model `name`: image tokens first where it has any, then `length` text tokens,
    unpadded.
    """
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(10, VOCAB, (size, length), generator=generator)
    image = torch.full((size, IMAGE_TOKENS.get(name, 0)), IMAGE_TOKEN)
    first = torch.full(
        (size, 1), 7 if name == "qwen2_5_vl" else 1
    )  # Qwen counts images by their start token
    input_ids = torch.cat([first, image, text], 1)
    result = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)} | _pixels(
        name, size, generator
    )
    return (
        result | {"labels": torch.where(input_ids == IMAGE_TOKEN, -100, input_ids)}
        if labels
        else result
    )


def _pixels(name: str, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    if name in ("llava", "llava_gqa", "llava_mqa"):
        return {"pixel_values": torch.randn(size, 3, 32, 32, generator=generator)}
    if name == "llava_next":
        return {
            "pixel_values": torch.randn(size, 2, 3, 32, 32, generator=generator),
            "image_sizes": torch.tensor([[32, 32]] * size),
        }
    if name == "qwen2_5_vl":
        return {
            "pixel_values": torch.randn(size * 64, 3 * 2 * 4 * 4, generator=generator),
            "image_grid_thw": torch.tensor([[1, 8, 8]] * size),
        }
    if name == "mllama":
        ones = torch.ones(size, 1, 1, dtype=torch.long)
        return {
            "pixel_values": torch.randn(size, 1, 1, 3, 16, 16, generator=generator),
            "aspect_ratio_ids": ones[:, 0],
            "aspect_ratio_mask": ones,
        }
    if name == "smolvlm":
        return {"pixel_values": torch.randn(size, 1, 3, 32, 32, generator=generator)}
    return {}


def save_language_model(place: Path) -> Path:
    """`place`, with the folder "llama" of a tiny Llama whose tokenizer has a chat template, and
    "chats.jsonl", whose last row is none.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from hipp_ext.testbed import WEIGHTS

    sizes = dict(hidden_size=32, intermediate_size=44, num_hidden_layers=2, vocab_size=300)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(place / "llama")
    AutoTokenizer.from_pretrained(WEIGHTS).save_pretrained(place / "llama")
    asked = [{"role": "user", "content": f"what is {n}"} for n in range(8)]
    chats = [{"messages": [q, {"role": "assistant", "content": "a number"}]} for q in asked]
    lines = map(json.dumps, [*chats, {"something": "else"}])
    (place / "chats.jsonl").write_text("\n".join(lines))
    return place


def save_chats(folder: Path) -> None:
    """Write "chats.jsonl" in LLaVA's format: 16 of the testbed's questions, with their pictures."""
    from hipp_ext import testbed

    rows = []
    asked = [q for q in testbed.questions("POPE", "calibration") if q.image is not None][:16]
    for number, question in enumerate(asked):
        question.image.save(folder / f"{number}.png")
        turns = [
            {"from": "human", "value": f"<image>\n{question.prompt}"},
            {"from": "gpt", "value": question.answer},
        ]
        rows.append(json.dumps({"image": f"{number}.png", "conversations": turns}))
    (folder / "chats.jsonl").write_text("\n".join(rows))
