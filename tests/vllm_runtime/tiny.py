"""Tiny models that vLLM's CPU kernels can serve (heads of 32), with processors for those that see.

Weights are random, pictures are random dots, and words are numbers.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
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


def _clip(cls: str = "CLIPVisionConfig") -> Any:
    import transformers

    return getattr(transformers, cls)(
        hidden_size=64,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )


def as_on_the_hub(model: Any) -> Any:
    """A LLaVA, loaded from a folder in which its vision tower has the hub's names."""
    from hipp_ext.testbed.model import use_hub_names

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        use_hub_names(Path(folder) / "model.safetensors")
        return type(model).from_pretrained(folder)


GREY = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)


def llava() -> tuple[Any, Any, list[Any]]:
    """The testbed's model, untrained and with heads of 32."""
    from hipp_ext.testbed.model import build_model, build_processor, vocabulary

    prompts = questions("<image>", 40, vocabulary=vocabulary()[5:])
    return as_on_the_hub(build_model(heads=4)), build_processor(), prompts


def llava_next() -> tuple[Any, Any, list[Any]]:
    from transformers import (
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    words = tokenizer("<image>", extra_special_tokens={"image_token": "<image>"})
    pictures = LlavaNextImageProcessor(
        **GREY,
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=[[32, 64], [64, 32]],
    )
    processor = LlavaNextProcessor(
        image_processor=pictures,
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = LlavaNextConfig(
        vision_config=_clip(),
        text_config=LlamaConfig(**sizes()),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[32, 64], [64, 32]],
    )
    model = as_on_the_hub(LlavaNextForConditionalGeneration(config))
    return model, processor, questions("<image>", 48)


def qwen2_5_vl() -> tuple[Any, Any, list[Any]]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers import Qwen2_5_VLProcessor as Processor

    words, vision, own = _qwen_parts()
    config = Qwen2_5_VLConfig(
        text_config=own,
        vision_config=vision
        | dict(
            num_heads=2,
            hidden_size=64,
            intermediate_size=52,
            out_hidden_size=128,
            window_size=16,
            fullatt_block_indexes=[1],
        ),
        **_qwen_tokens(words),
    )
    return _qwen(Qwen2_5_VLForConditionalGeneration(config), Processor, words)


def qwen2_vl() -> tuple[Any, Any, list[Any]]:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers import Qwen2VLProcessor as Processor

    words, vision, own = _qwen_parts()
    config = Qwen2VLConfig(
        text_config=own,
        vision_config=vision | dict(num_heads=2, embed_dim=64, hidden_size=128, mlp_ratio=1),
        **_qwen_tokens(words),
    )
    return _qwen(Qwen2VLForConditionalGeneration(config), Processor, words)


def _qwen_parts() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    vision = dict(depth=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
    own = sizes(hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
    del own["head_dim"]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    return tokenizer(*marks), vision, own | {"rope_parameters": rope}


def _qwen_tokens(words: Any) -> dict[str, int]:
    names = dict(image="<|image_pad|>", video="<|video_pad|>")
    names |= dict(vision_start="<|vision_start|>", vision_end="<|vision_end|>")
    return {f"{k}_token_id": words.convert_tokens_to_ids(v) for k, v in names.items()}


def _qwen(model: Any, processor: Any, words: Any) -> tuple[Any, Any, list[Any]]:
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    settings = dict(patch_size=4, merge_size=2, temporal_patch_size=2) | GREY
    area = {"shortest_edge": 16 * 16, "longest_edge": 48 * 48}
    made = processor(
        image_processor=Qwen2VLImageProcessor(**settings, size=area),
        video_processor=Qwen2VLVideoProcessor(**settings, size=area),
        tokenizer=words,
    )
    mark = "<|vision_start|> <|image_pad|> <|vision_end|>"
    return model, made, questions(mark, 32)


def qwen3_vl() -> tuple[Any, Any, list[Any]]:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers import Qwen3VLProcessor as Processor

    words, vision, _ = _qwen_parts()
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
    config = Qwen3VLConfig(
        text_config=sizes() | {"rope_parameters": rope | {"mrope_interleaved": True}},
        vision_config=vision
        | dict(
            num_heads=2,
            hidden_size=64,
            intermediate_size=52,
            out_hidden_size=48,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0],
        ),
        **_qwen_tokens(words),
    )
    return _qwen(Qwen3VLForConditionalGeneration(config), Processor, words)


def _idefics3(kind: str) -> tuple[Any, Any, list[Any]]:
    import transformers
    from transformers import LlamaConfig

    rows = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    marks = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *rows)
    words = tokenizer(*marks)
    pictures = getattr(transformers, f"{kind}ImageProcessor")(
        **GREY, size={"longest_edge": 32}, max_image_size={"longest_edge": 32}
    )
    parts = dict(image_processor=pictures, tokenizer=words, image_seq_len=4)
    if kind == "SmolVLM":
        parts["video_processor"] = transformers.SmolVLMVideoProcessor(
            **GREY,
            size={"longest_edge": 32},
            max_image_size={"longest_edge": 32},
            fps=1,
            num_frames=4,
            video_sampling={"fps": 1, "max_frames": 4, "video_size": {"longest_edge": 32}},
        )
    config = getattr(transformers, f"{kind}Config")(
        text_config=LlamaConfig(**sizes(vocab_size=120)).to_dict(),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
        vision_config=_clip(f"{kind}VisionConfig").to_dict(),
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    processor = getattr(transformers, f"{kind}Processor")(**parts)
    return model, processor, questions("<image>", 32)


def llava_onevision() -> tuple[Any, Any, list[Any]]:
    import transformers
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
    )

    words = tokenizer("<image>", "<video>")
    settings = GREY | dict(size={"height": 32, "width": 32})
    pins = [[32, 64], [64, 32]]
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(
            **settings, image_grid_pinpoints=pins
        ),
        video_processor=transformers.LlavaOnevisionVideoProcessor(**settings),
        tokenizer=words,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )
    own = sizes(hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
    del own["head_dim"]
    config = LlavaOnevisionConfig(
        vision_config=_clip("SiglipVisionConfig"),
        text_config=Qwen2Config(**own),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        video_token_id=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pins,
        vision_feature_layer=-1,
    )
    model = as_on_the_hub(LlavaOnevisionForConditionalGeneration(config))
    return model, processor, questions("<image>", 48)


def internvl() -> tuple[Any, Any, list[Any]]:
    import transformers
    from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

    marks = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    named = dict(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    words = tokenizer(*marks, extra_special_tokens=named)
    settings = GREY | dict(size={"height": 32, "width": 32})
    processor = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(**settings, crop_to_patches=False),
        video_processor=transformers.InternVLVideoProcessor(**settings),
        tokenizer=words,
        image_seq_length=4,
    )
    own = sizes(hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
    del own["head_dim"]
    config = InternVLConfig(
        vision_config=dict(
            hidden_size=64,
            intermediate_size=52,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=[32, 32],
            patch_size=[8, 8],
        ),
        text_config=Qwen2Config(**own),
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return InternVLForConditionalGeneration(config), processor, questions("<IMG_CONTEXT>", 32)


def gemma3() -> tuple[Any, Any, list[Any]]:
    import transformers
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    lines = ["\n" * i for i in range(1, 5)]
    marks = ("<start_of_image>", "<end_of_image>", "<image_soft_token>", *lines)
    named = dict(
        boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"
    )
    words = tokenizer(*marks, extra_special_tokens=named)
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(**GREY, size={"height": 32, "width": 32}),
        tokenizer=words,
        image_seq_length=4,
    )
    own = sizes(sliding_window=16, query_pre_attn_scalar=32)
    config = Gemma3Config(
        text_config=own | {"layer_types": ["sliding_attention", "full_attention"] * 2},
        vision_config=_clip("SiglipVisionConfig").to_dict(),
        mm_tokens_per_image=4,
        image_token_id=words.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
    )
    return Gemma3ForConditionalGeneration(config), processor, questions("<start_of_image>", 32)


TEXT: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma3_text": gemma3_text,
}
PICTURES: dict[str, Callable[[], tuple[Any, Any, list[Any]]]] = {
    "llava": llava,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen2_vl": qwen2_vl,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen3_vl": qwen3_vl,
    "idefics3": lambda: _idefics3("Idefics3"),
    "smolvlm": lambda: _idefics3("SmolVLM"),
    "internvl": internvl,
    "gemma3": gemma3,
}
