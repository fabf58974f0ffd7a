"""Tiny models of the LLaVA kind, with processors and questions about pictures; see `tiny`."""

import tempfile
from pathlib import Path
from typing import Any

from tiny import questions, sizes, tokenizer

GREY = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)


def as_on_the_hub(model: Any) -> Any:
    """A LLaVA, loaded from a folder in which its vision tower has the hub's names."""
    from hipp_ext.testbed.model import use_hub_names

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        use_hub_names(Path(folder) / "model.safetensors")
        return type(model).from_pretrained(folder)


def clip(cls: str = "CLIPVisionConfig") -> Any:
    import transformers

    return getattr(transformers, cls)(
        hidden_size=64,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )


def llava() -> tuple[Any, Any, list[Any]]:
    """The testbed's model, untrained and with heads of 32."""
    from hipp_ext.testbed.model import build_model, build_processor, vocabulary

    prompts = questions("<image>", 40, vocabulary=vocabulary()[5:])
    return as_on_the_hub(build_model(heads=4)), build_processor(), prompts


def llava_72() -> tuple[Any, Any, list[Any]]:
    """The same with a hidden size of 72.

    vLLM's 8-bit kernels for multiples of 32 compute in 16 bits on CPUs that have AMX; those for
    other sizes compute in 32 bits everywhere.
    """
    from transformers import LlamaConfig, LlavaForConditionalGeneration

    model, processor, prompts = llava()
    own = sizes(hidden_size=72, vocab_size=model.config.text_config.vocab_size)
    model.config.text_config = LlamaConfig(**own)
    return as_on_the_hub(LlavaForConditionalGeneration(model.config)), processor, prompts


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
        vision_config=clip(),
        text_config=LlamaConfig(**sizes()),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[32, 64], [64, 32]],
    )
    model = as_on_the_hub(LlavaNextForConditionalGeneration(config))
    return model, processor, questions("<image>", 48)


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
        vision_config=clip("SiglipVisionConfig"),
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
        vision_config=clip("SiglipVisionConfig").to_dict(),
        mm_tokens_per_image=4,
        image_token_id=words.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
    )
    model = as_on_the_hub(Gemma3ForConditionalGeneration(config))
    return model, processor, questions("<start_of_image>", 32)
