"""Models that take pictures or sound besides text."""

from typing import Any

import torch
from zoo.family import Family, Inputs, pixels, sees
from zoo.language import GEMMA3N, GEMMA4, LINEAR_FIRST
from zoo.sizes import AUDIO, END, HIDDEN, IMAGE, KV_HEADS, START

PICTURE = pixels(3, 32, 32)
TOWERS = dict(clip="clip_vision_model", siglip="siglip_vision_model", siglip2="siglip2_vision_model")
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
MROPE_SHORT = MROPE | {"mrope_section": [1, 1, 1]}
AROUND = (START, IMAGE, IMAGE, IMAGE, IMAGE, END)


def grid(channels: int = 3 * 2 * 8 * 8, name: str = "image_grid_thw") -> Inputs:
    """Patches of all pictures in a row, 4 x 4 of each, as the Qwen models take them."""

    def make(rows: int, generator: torch.Generator) -> dict[str, Any]:
        values = torch.randn(rows * 16, channels, generator=generator)
        return {"pixel_values": values, name: torch.tensor([[1, 4, 4]] * rows)}

    return make


def wrapped(name: str, tokens: Any, text: str, tower: str, inputs: Inputs = PICTURE, **given) -> Family:
    """A wrapper that names the classes of its towers in its configuration."""
    own, vision = given.pop("text_config", {}), given.pop("vision_config", {})
    return sees(
        name,
        tokens,
        inputs,
        text_config={"model_type": text} | own,
        vision_config={"model_type": TOWERS.get(tower, tower)} | vision,
        **given,
    )


VISION_LANGUAGE_MODELS: dict[str, Family] = {
    "llava": wrapped("llava", 16, "llama", "clip"),
    "llava_pixtral": wrapped("llava", 16, "mistral", "pixtral", vision_feature_layer=-1,
        vision_feature_select_strategy="full", inputs=pixels(3, 32, 32, image_sizes=[32, 32])),
    "llava_next": wrapped("llava_next", 36, "llama", "clip", image_grid_pinpoints=[[32, 32]],
        inputs=pixels(2, 3, 32, 32, image_sizes=[32, 32])),
    "llava_next_granite": wrapped("llava_next", 36, "granite", "siglip", vision_feature_select_strategy="full",
        image_grid_pinpoints=[[32, 32]], text_config=dict(logits_scaling=3.0, residual_multiplier=0.4),
        inputs=pixels(2, 3, 32, 32, image_sizes=[32, 32])),
    "llava_next_video": wrapped("llava_next_video", 36, "llama", "clip", image_grid_pinpoints=[[32, 32]],
        inputs=pixels(2, 3, 32, 32, image_sizes=[32, 32])),
    "llava_onevision": wrapped("llava_onevision", 37, "qwen2", "siglip", image_grid_pinpoints=[[32, 32]],
        inputs=pixels(2, 3, 32, 32, image_sizes=[32, 32])),
    "vipllava": wrapped("vipllava", 16, "llama", "clip", vision_feature_layers=[0, 1]),
    "video_llava": wrapped("video_llava", 17, "llama", "clip"),
    "qwen2_vl": sees("qwen2_vl", AROUND, grid(), text_config=dict(rope_parameters=MROPE_SHORT),
        vision_config=dict(hidden_size=HIDDEN)),
    "qwen2_5_vl": sees("qwen2_5_vl", AROUND, grid(), text_config=dict(rope_parameters=MROPE_SHORT),
        vision_config=dict(window_size=32, fullatt_block_indexes=[1])),
    "qwen3_vl": sees("qwen3_vl", AROUND, grid(), text_config=dict(rope_parameters=MROPE),
        vision_config=dict(num_position_embeddings=16, deepstack_visual_indexes=[0])),
    "qwen3_vl_moe": sees("qwen3_vl_moe", AROUND, grid(), text_config=dict(rope_parameters=MROPE),
        vision_config=dict(num_position_embeddings=16, deepstack_visual_indexes=[0])),
    "qwen3_5": sees("qwen3_5", AROUND, grid(), vision_config=dict(num_position_embeddings=16),
        text_config=dict(rope_parameters=MROPE_SHORT | {"partial_rotary_factor": 0.5}, layer_types=["full_attention"] * 2)),
    "qwen3_5_order": sees("qwen3_5", AROUND, grid(), vision_config=dict(num_position_embeddings=16),
        text_config=dict(num_hidden_layers=3, layer_types=LINEAR_FIRST, rope_parameters=MROPE_SHORT | {"partial_rotary_factor": 0.5})),
    "qwen3_5_moe": sees("qwen3_5_moe", AROUND, grid(), vision_config=dict(num_position_embeddings=16),
        text_config=dict(num_hidden_layers=3, layer_types=LINEAR_FIRST, rope_parameters=MROPE_SHORT | {"partial_rotary_factor": 0.5})),
    "internvl": sees("internvl", 4, PICTURE, text_config={"model_type": "qwen2"},
        vision_config=dict(image_size=[32, 32], patch_size=[8, 8])),
    "idefics2": sees("idefics2", 5, pixels(1, 3, 32, 32), text_config={"model_type": "mistral", "head_dim": 6},
        perceiver_config=dict(hidden_size=HIDDEN, resampler_n_latents=5, resampler_depth=1, resampler_n_heads=2,
            resampler_head_dim=8, num_key_value_heads=1)),
    "idefics3": sees("idefics3", 4, pixels(1, 3, 32, 32), text_config={"model_type": "llama"}),
    "smolvlm": sees("smolvlm", 4, pixels(1, 3, 32, 32), text_config={"model_type": "llama"}),
    "paligemma": wrapped("paligemma", 16, "gemma", "siglip", projection_dim=HIDDEN),
    "paligemma2": wrapped("paligemma", 16, "gemma2", "siglip", projection_dim=HIDDEN,
        text_config=dict(final_logit_softcapping=3.0)),
    "gemma3": sees("gemma3", 16, PICTURE, mm_tokens_per_image=16),
    "gemma3n": sees("gemma3n", 4, PICTURE, text_config=GEMMA3N),
    "gemma4": sees("gemma4", 4, PICTURE, text_config=GEMMA4),
    "mistral3": wrapped("mistral3", 4, "mistral", "pixtral", inputs=pixels(3, 32, 32, image_sizes=[32, 32])),
    "aya_vision": wrapped("aya_vision", 4, "cohere2", "siglip"),
    "cohere2_vision": wrapped("cohere2_vision", 4, "cohere2", "siglip", alignment_intermediate_size=40),
    "llama4": sees("llama4", 4, PICTURE, text_config=dict(moe_layers=[1], intermediate_size_mlp=52),
        vision_config=dict(vision_output_dim=40, projector_input_dim=40, projector_output_dim=40, intermediate_size=144)),
    "glm4v": sees("glm4v", AROUND, grid(), text_config=dict(rope_parameters=MROPE_SHORT)),
    "glm46v": wrapped("glm46v", AROUND, "glm4v_text", "glm4v_vision", grid(), text_config=dict(rope_parameters=MROPE_SHORT)),
    "glm4v_moe": sees("glm4v_moe", AROUND, grid(), text_config=dict(rope_parameters=MROPE_SHORT)),
    "glm_ocr": sees("glm_ocr", AROUND, grid(), text_config=dict(rope_parameters=MROPE_SHORT)),
    "kosmos2": sees("kosmos-2", 4, PICTURE),
    "kosmos2_5": sees("kosmos-2.5", 4, PICTURE),
    "blip2": sees("blip-2", 3, PICTURE, text_config={"model_type": "opt"}, num_query_tokens=3,
        qformer_config=dict(hidden_size=24, num_attention_heads=2, encoder_hidden_size=36)),
    "instructblip": sees("instructblip", 3, PICTURE, text_config={"model_type": "opt"}, num_query_tokens=3,
        qformer_config=dict(hidden_size=24, num_attention_heads=2, encoder_hidden_size=36)),
    "phi4_multimodal": sees("phi4_multimodal", 4, PICTURE),
    "deepseek_vl": wrapped("deepseek_vl", 16, "llama", "siglip"),
    "deepseek_vl_hybrid": wrapped("deepseek_vl_hybrid", 16, "llama", "siglip", high_res_vision_config={"model_type": "sam_vision_model"}),
    "deepseek_ocr2": sees("deepseek_ocr2", 4, PICTURE),
    "janus": sees("janus", 16, PICTURE, text_config={"model_type": "llama"}),
    "fuyu": sees("fuyu", 4, PICTURE, text_config={"model_type": "persimmon"}),
    "ovis2": wrapped("ovis2", 16, "qwen2", "aimv2_vision_model"),
    "perception_lm": sees("perception_lm", 4, PICTURE, text_config={"model_type": "llama"}),
    "florence2": sees("florence2", 4, PICTURE, text_config={"model_type": "bart"}),
    "got_ocr2": sees("got_ocr2", 4, PICTURE, text_config={"model_type": "qwen2"}),
    "lfm2_vl": wrapped("lfm2_vl", 4, "lfm2", "siglip2", text_config=dict(num_hidden_layers=3, block_multiple_of=4,
        layer_types=["conv", "full_attention", "conv"])),
    "fast_vlm": wrapped("fast_vlm", 4, "qwen2", "timm_wrapper"),
    "kimi_k25": sees("kimi_k25", 4, PICTURE, text_config={"model_type": "deepseek_v3", "num_key_value_heads": 8}),
    "hunyuan_vl": sees("hunyuan_vl", 4, PICTURE),
    "ernie4_5_vl_moe": sees("ernie4_5_vl_moe", AROUND, grid()),
    "paddleocr_vl": sees("paddleocr_vl", AROUND, grid(), text_config=dict(rope_parameters=MROPE)),
    "lighton_ocr": wrapped("lighton_ocr", 4, "qwen3", "pixtral", inputs=pixels(3, 32, 32, image_sizes=[32, 32])),
    "video_llama_3": sees("video_llama_3", 4, grid(), text_config={"model_type": "qwen2"}),
    "granite4_vision": wrapped("granite4_vision", 36, "granite", "siglip", image_grid_pinpoints=[[32, 32]],
        inputs=pixels(2, 3, 32, 32, image_sizes=[32, 32]), qformer_config={"model_type": "blip_2_qformer"}),
    "minicpmv4_6": sees("minicpmv4_6", 4, PICTURE, text_config={"model_type": "qwen3_5_text"}),
    "exaone4_5": wrapped("exaone4_5", AROUND, "exaone4", "qwen2_5_vl_vision", grid()),
    "aria": wrapped("aria", 4, "aria_text", "idefics3_vision", text_config=dict(num_key_value_heads=KV_HEADS)),
    "chameleon": sees("chameleon", 4, PICTURE),
    "qwen2_5_omni": sees("qwen2_5_omni_thinker", AROUND, grid(), text_config=dict(rope_parameters=MROPE_SHORT)),
    "qwen3_omni_moe": sees("qwen3_omni_moe_thinker", AROUND, grid(), text_config=dict(rope_parameters=MROPE)),
    "qianfan_ocr": sees("qianfan_ocr", 4, PICTURE, text_config={"model_type": "qwen3"},
        vision_config=dict(image_size=[32, 32], patch_size=[8, 8])),
    "emu3": sees("emu3", 4, PICTURE),
    "gemma4_unified": sees("gemma4_unified", 4, PICTURE, text_config=GEMMA4),
    "muse_glimmer": sees("muse_glimmer", 4, PICTURE),
    "step3p7": sees("step3p7", 4, PICTURE),
    "minimax_m3_vl": wrapped("minimax_m3_vl", 4, "minimax_m3_vl_text", "minimax_m3_vl_vision", grid()),
    "inkling": sees("inkling_mm_model", 4, PICTURE),
    "qwen2_audio": sees("qwen2_audio", (AUDIO,) * 4, PICTURE, text_config={"model_type": "qwen2"},
        audio_config={"model_type": "qwen2_audio_encoder"}),
    "voxtral": sees("voxtral", (AUDIO,) * 4, PICTURE, text_config={"model_type": "llama"},
        audio_config={"model_type": "voxtral_encoder"}),
    "granite_speech": sees("granite_speech", (AUDIO,) * 4, PICTURE, text_config={"model_type": "granite"},
        projector_config={"model_type": "blip_2_qformer"}),
    "mllama": sees("mllama", 1, PICTURE, text_config=dict(num_hidden_layers=3, cross_attention_layers=[1])),
}
