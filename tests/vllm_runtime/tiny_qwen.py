"""Tiny models of the Qwen-VL kind, with processors and questions about pictures; see `tiny`."""

from typing import Any

from tiny import questions, sizes, tokenizer
from tiny_llava import GREY


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
