"""Models that take pictures or sound besides text."""

from typing import Any

import torch

from zoo.family import Family, Inputs, pixels, sees
from zoo.language import GEMMA3N, GEMMA4, LINEAR_FIRST
from zoo.sizes import AUDIO, END, HIDDEN, IMAGE, KV_HEADS, START, VOCAB

PICTURE = pixels(3, 32, 32)
TOWERS = dict(
    clip="clip_vision_model", siglip="siglip_vision_model", siglip2="siglip2_vision_model"
)
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
MROPE_SHORT = MROPE | {"mrope_section": [1, 1, 1]}
MROPE4 = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]}
OMNI = dict(
    vision_start_token_id=START,
    audio_config=dict(num_mel_bins=8, max_source_positions=20, downsample_hidden_size=8),
    vision_config=dict(
        window_size=32,
        fullatt_block_indexes=[1],
        num_position_embeddings=16,
        deepstack_visual_indexes=[0],
    ),
)
VQ = dict(base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1, num_embeddings=11)
AROUND = (START, IMAGE, IMAGE, IMAGE, IMAGE, END)


def grid(channels: int = 3 * 2 * 8 * 8, shape: tuple[int, ...] = (), **more: int) -> Inputs:
    """Patches of all pictures in a row, 4 x 4 of each, as the Qwen models take them."""

    def make(rows: int, generator: torch.Generator) -> dict[str, Any]:
        values = torch.randn(shape or (rows * 16, channels), generator=generator)
        others = {name: torch.tensor([value] * rows) for name, value in more.items()}
        return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, 4, 4]] * rows)} | others

    return make


def patches(count: int, channels: int) -> Inputs:
    """Patches with their places in a square, as Gemma 4 takes them."""
    side = int(count**0.5)
    places = [[i % side, i // side] for i in range(count)]
    return pixels(count, channels, image_position_ids=places)


def two_resolutions(rows: int, generator: torch.Generator) -> dict[str, Any]:
    """A picture in two sizes."""
    return pixels(3, 32, 32)(rows, generator) | pixels(3, 64, 64, name="high_res_pixel_values")(
        rows, generator
    )


def navit(rows: int, generator: torch.Generator) -> dict[str, Any]:
    """Patches of all pictures side by side, as MiniCPM takes them."""
    values = torch.randn(1, 3, 8, 8 * 16 * rows, generator=generator)
    return {"pixel_values": values, "target_sizes": torch.tensor([[4, 4]] * rows)}


def sound(rows: int, generator: torch.Generator) -> dict[str, Any]:
    """A spectrogram, as Qwen2-Audio takes it."""
    mask = torch.ones(rows, 32, dtype=torch.long)
    values = torch.randn(rows, 8, 32, generator=generator)
    return {"input_features": values, "feature_attention_mask": mask}


def flattened(rows: int, generator: torch.Generator) -> dict[str, Any]:
    """Patches that begin with their row and column, as Kosmos-2.5 takes them."""
    values = torch.randn(rows, 16, 24, generator=generator)
    places = torch.tensor([[i // 4 + 1.0, i % 4 + 1.0] for i in range(16)]).expand(rows, 16, 2)
    mask = torch.tensor([[0, *[1] * 4, *[0] * 6]] * rows)
    return {"flattened_patches": torch.cat([places, values], 2), "image_embeds_position_mask": mask}


def visual_words(form: str) -> dict[str, int]:
    """The vocabulary of a model that reads a picture as tokens of its own."""
    words = {form.format(i): 20 + i for i in range(11)}
    return words | {"<image>": IMAGE, "<|extra_200|>": 11}


def wrapped(
    name: str, tokens: Any, text: str, tower: str, inputs: Inputs = PICTURE, **given
) -> Family:
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
    "llava_pixtral": wrapped(
        "llava",
        16,
        "mistral",
        "pixtral",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        inputs=pixels(3, 32, 32, image_sizes=[32, 32]),
    ),
    "llava_next": wrapped(
        "llava_next",
        36,
        "llama",
        "clip",
        image_grid_pinpoints=[[32, 32]],
        inputs=pixels(2, 3, 32, 32, image_sizes=[32, 32]),
    ),
    "llava_next_granite": wrapped(
        "llava_next",
        36,
        "granite",
        "siglip",
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[32, 32]],
        text_config=dict(logits_scaling=3.0, residual_multiplier=0.4),
        inputs=pixels(2, 3, 32, 32, image_sizes=[32, 32]),
    ),
    "llava_next_video": wrapped(
        "llava_next_video",
        36,
        "llama",
        "clip",
        image_grid_pinpoints=[[32, 32]],
        inputs=pixels(2, 3, 32, 32, image_sizes=[32, 32]),
    ),
    "llava_onevision": wrapped(
        "llava_onevision",
        36,
        "qwen2",
        "siglip",
        image_grid_pinpoints=[[32, 32]],
        inputs=pixels(2, 3, 32, 32, image_sizes=[32, 32]),
    ),
    "vipllava": wrapped("vipllava", 16, "llama", "clip", vision_feature_layers=[0, 1]),
    "video_llava": wrapped(
        "video_llava", 16, "llama", "clip", inputs=pixels(3, 32, 32, name="pixel_values_images")
    ),
    "qwen2_vl": sees(
        "qwen2_vl",
        AROUND,
        grid(),
        text_config=dict(rope_parameters=MROPE_SHORT),
        vision_config=dict(hidden_size=HIDDEN),
    ),
    "qwen2_5_vl": sees(
        "qwen2_5_vl",
        AROUND,
        grid(),
        text_config=dict(rope_parameters=MROPE_SHORT),
        vision_config=dict(window_size=32, fullatt_block_indexes=[1]),
    ),
    "qwen3_vl": sees(
        "qwen3_vl",
        AROUND,
        grid(),
        text_config=dict(rope_parameters=MROPE),
        vision_config=dict(num_position_embeddings=16, deepstack_visual_indexes=[0]),
    ),
    "qwen3_vl_moe": sees(
        "qwen3_vl_moe",
        AROUND,
        grid(),
        text_config=dict(rope_parameters=MROPE),
        vision_config=dict(num_position_embeddings=16, deepstack_visual_indexes=[0]),
    ),
    "qwen3_5": sees(
        "qwen3_5",
        AROUND,
        grid(),
        vision_config=dict(num_position_embeddings=16),
        text_config=dict(
            rope_parameters=MROPE_SHORT | {"partial_rotary_factor": 0.5},
            layer_types=["full_attention"] * 2,
        ),
    ),
    "qwen3_5_order": sees(
        "qwen3_5",
        AROUND,
        grid(),
        vision_config=dict(num_position_embeddings=16),
        text_config=dict(
            num_hidden_layers=3,
            layer_types=LINEAR_FIRST,
            rope_parameters=MROPE_SHORT | {"partial_rotary_factor": 0.5},
        ),
    ),
    "qwen3_5_moe": sees(
        "qwen3_5_moe",
        AROUND,
        grid(),
        vision_config=dict(num_position_embeddings=16),
        text_config=dict(
            num_hidden_layers=3,
            layer_types=LINEAR_FIRST,
            rope_parameters=MROPE_SHORT | {"partial_rotary_factor": 0.5},
        ),
    ),
    "internvl": sees(
        "internvl",
        4,
        PICTURE,
        text_config={"model_type": "qwen2"},
        vision_config=dict(image_size=[32, 32], patch_size=[8, 8]),
    ),
    "idefics2": sees(
        "idefics2",
        5,
        pixels(1, 3, 32, 32),
        text_config={"model_type": "mistral", "head_dim": 6},
        perceiver_config=dict(
            hidden_size=HIDDEN,
            resampler_n_latents=5,
            resampler_depth=1,
            resampler_n_heads=2,
            resampler_head_dim=8,
            num_key_value_heads=1,
        ),
    ),
    "idefics3": sees("idefics3", 4, pixels(1, 3, 32, 32), text_config={"model_type": "llama"}),
    "smolvlm": sees("smolvlm", 4, pixels(1, 3, 32, 32), text_config={"model_type": "llama"}),
    "paligemma": wrapped("paligemma", 16, "gemma", "siglip", projection_dim=HIDDEN),
    "paligemma2": wrapped(
        "paligemma",
        16,
        "gemma2",
        "siglip",
        projection_dim=HIDDEN,
        text_config=dict(final_logit_softcapping=3.0),
    ),
    "gemma3": sees("gemma3", 16, PICTURE, mm_tokens_per_image=16),
    "gemma3n": sees(
        "gemma3n",
        4,
        PICTURE,
        text_config=GEMMA3N,
        vision_soft_tokens_per_image=4,
        vision_config=dict(
            hidden_size=2048,
            vocab_size=3,
            vocab_offset=VOCAB,
            model_args=dict(channel_multiplier=0.02, msfa_output_resolution=2),
        ),
        audio_config=dict(
            hidden_size=24,
            vocab_size=3,
            vocab_offset=VOCAB + 3,
            conf_num_attention_heads=2,
            conf_num_hidden_layers=1,
            sscp_conv_channel_size=[8, 4],
        ),
    ),
    "gemma4": sees(
        "gemma4",
        4,
        patches(36, 48),
        text_config=GEMMA4,
        audio_config=None,
        vision_config=dict(head_dim=12, patch_size=4, position_embedding_size=8),
    ),
    "mistral3": wrapped(
        "mistral3", 4, "mistral", "pixtral", inputs=pixels(3, 32, 32, image_sizes=[32, 32])
    ),
    "aya_vision": wrapped("aya_vision", 4, "cohere2", "siglip"),
    "cohere2_vision": wrapped(
        "cohere2_vision", 4, "cohere2", "siglip", alignment_intermediate_size=40
    ),
    "llama4": sees(
        "llama4",
        4,
        PICTURE,
        text_config=dict(moe_layers=[1], intermediate_size_mlp=52),
        vision_config=dict(
            vision_output_dim=40,
            projector_input_dim=40,
            projector_output_dim=40,
            intermediate_size=144,
        ),
    ),
    "glm4v": sees("glm4v", AROUND, grid(), text_config=dict(rope_parameters=MROPE_SHORT)),
    "glm46v": wrapped(
        "glm46v",
        AROUND,
        "glm4v_text",
        "glm4v_vision",
        grid(),
        text_config=dict(rope_parameters=MROPE_SHORT),
    ),
    "glm4v_moe": sees(
        "glm4v_moe",
        AROUND,
        grid(),
        text_config=dict(num_attention_heads=4, num_key_value_heads=2, rope_parameters=MROPE_SHORT),
    ),
    "glm_ocr": sees("glm_ocr", AROUND, grid(), text_config=dict(rope_parameters=MROPE_SHORT)),
    "kosmos2": sees(
        "kosmos-2",
        4,
        pixels(3, 32, 32, image_embeds_position_mask=[0] + [1] * 4 + [0] * 6),
        latent_query_num=4,
    ),
    "kosmos2_5": sees(
        "kosmos-2.5",
        4,
        flattened,
        latent_query_num=4,
        vision_config=dict(head_dim=12, patch_embed_hidden_size=24, max_num_patches=16),
    ),
    "blip2": sees(
        "blip-2",
        3,
        PICTURE,
        text_config={"model_type": "opt"},
        num_query_tokens=3,
        qformer_config=dict(
            hidden_size=24, num_attention_heads=2, encoder_hidden_size=36, vocab_size=20
        ),
    ),
    "instructblip": sees(
        "instructblip",
        3,
        pixels(3, 32, 32, qformer_input_ids=[12, 13, 14]),
        text_config={"model_type": "opt"},
        num_query_tokens=3,
        qformer_config=dict(
            hidden_size=24, num_attention_heads=2, encoder_hidden_size=36, vocab_size=20
        ),
    ),
    "phi4_multimodal": sees(
        "phi4_multimodal",
        13,
        pixels(
            2,
            3,
            32,
            32,
            name="image_pixel_values",
            image_sizes=[32, 32],
            image_attention_mask=[[[1] * 4] * 4] * 2,
        ),
        vision_config=dict(crop_size=32),
        audio_config=dict(
            num_blocks=1,
            hidden_size=24,
            intermediate_size=20,
            num_attention_heads=2,
            ext_pw_out_channel=24,
            depthwise_separable_out_channel=24,
            nemo_conv_channels=8,
        ),
    ),
    "deepseek_vl": wrapped("deepseek_vl", 16, "llama", "siglip"),
    "deepseek_vl_hybrid": wrapped(
        "deepseek_vl_hybrid",
        16,
        "llama",
        "siglip",
        inputs=two_resolutions,
        high_res_vision_config={
            "model_type": "sam_vision_model",
            "image_size": 64,
            "output_channels": 12,
            "global_attn_indexes": [1],
            "window_size": 2,
        },
    ),
    "deepseek_ocr2": sees(
        "deepseek_ocr2",
        145,
        PICTURE,
        text_config=dict(mlp_layer_types=["dense", "sparse"]),
        vision_config=dict(
            sam_config=dict(
                output_channels=12,
                global_attn_indexes=[1],
                window_size=2,
                downsample_channels=[20, 48],
            ),
            encoder_config=dict(sliding_window=None),
        ),
    ),
    "janus": sees(
        "janus",
        16,
        PICTURE,
        text_config={"model_type": "llama"},
        vision_config=dict(num_image_tokens=16),
        vq_config=dict(
            num_embeddings=11,
            latent_channels=8,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            num_patches=4,
            image_token_embed_dim=24,
            embed_dim=8,
        ),
    ),
    "fuyu": sees(
        "fuyu",
        4,
        pixels(4, 192, name="image_patches"),
        text_config={"model_type": "persimmon", "num_attention_heads": 4},
        patch_size=8,
        image_size=16,
        num_attention_heads=4,
    ),
    "ovis2": sees(
        "ovis2",
        16,
        PICTURE,
        text_config={"model_type": "qwen2"},
        visual_indicator_token_ids=[6, 7, 8, 9, 10],
        vision_config=dict(vocab_size=25),
    ),
    "perception_lm": sees(
        "perception_lm",
        16,
        pixels(1, 3, 32, 32),
        text_config={"model_type": "llama"},
        vision_config=dict(
            architecture="vit_pe_core_large_patch14_336",
            model_args=dict(
                embed_dim=36,
                img_size=[32, 32],
                patch_size=8,
                depth=2,
                num_heads=3,
                global_pool="",
                use_post_transformer_norm=False,
                init_values=0.1,
                ref_feat_shape=[4, 4],
            ),
        ),
    ),
    "florence2": sees(
        "florence2",
        17,
        PICTURE,
        text_config={
            "model_type": "bart",
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 44,
            "decoder_ffn_dim": 52,
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
        },
        vision_config=dict(
            depths=[1],
            patch_size=[7],
            patch_stride=[8],
            patch_padding=[3],
            patch_prenorm=[False],
            embed_dim=[24],
            num_heads=[2],
            num_groups=[2],
            window_size=4,
            projection_dim=48,
        ),
    ),
    "got_ocr2": sees(
        "got_ocr2",
        1,
        PICTURE,
        text_config={"model_type": "qwen2"},
        vision_config=dict(output_channels=12, global_attn_indexes=[1], window_size=2),
    ),
    "lfm2_vl": wrapped(
        "lfm2_vl",
        4,
        text="lfm2",
        tower="siglip2",
        projector_hidden_size=40,
        inputs=pixels(16, 192, pixel_attention_mask=[1] * 16, spatial_shapes=[4, 4]),
        text_config=dict(
            num_hidden_layers=3, block_multiple_of=4, layer_types=["conv", "full_attention", "conv"]
        ),
    ),
    "fast_vlm": wrapped(
        "fast_vlm",
        1,
        "qwen2",
        "timm_wrapper",
        pixels(3, 64, 64),
        vision_config=dict(
            architecture="fastvit_mci3",
            hidden_size=64,
            image_size=64,
            model_args=dict(
                inference_mode=True, layers=[1, 1, 1, 1, 1], embed_dims=[8, 8, 8, 32, 32]
            ),
        ),
    ),
    "kimi_k25": sees(
        "kimi_k25",
        4,
        grid(shape=(32, 3, 8, 8)),
        text_config={"model_type": "deepseek_v3", "num_key_value_heads": 8},
        image_token_id=IMAGE,
        vision_config=dict(pos_emb_height=4, pos_emb_width=4),
        projection_hidden_size=36,
    ),
    "hunyuan_vl": sees(
        "hunyuan_vl",
        8,
        grid(3 * 8 * 8),
        text_config=dict(rope_parameters=MROPE4),
        vision_config=dict(max_image_size=32, text_hidden_size=HIDDEN),
    ),
    "ernie4_5_vl_moe": sees(
        "ernie4_5_vl_moe",
        AROUND,
        grid(3 * 8 * 8),
        text_config=dict(
            moe_intermediate_size=[20, 12],
            mlp_layer_types=["dense", "sparse"],
            rope_parameters=MROPE_SHORT,
        ),
    ),
    "paddleocr_vl": sees(
        "paddleocr_vl", AROUND, grid(shape=(32, 3, 8, 8)), text_config=dict(rope_parameters=MROPE)
    ),
    "lighton_ocr": wrapped(
        "lighton_ocr", 4, "qwen3", "pixtral", inputs=pixels(3, 32, 32, image_sizes=[32, 32])
    ),
    "video_llama_3": sees(
        "video_llama_3",
        4,
        grid(3 * 8 * 8, image_merge_sizes=2),
        text_config={"model_type": "qwen2"},
    ),
    "granite4_vision": wrapped(
        "granite4_vision",
        10,
        "granite",
        "siglip",
        image_grid_pinpoints=[[32, 32]],
        inputs=pixels(2, 3, 32, 32, image_sizes=[32, 32]),
        downsample_rate="1/2",
        deepstack_layer_map=[[0, 0]],
        spatial_target_layers=[0, 0, 1, 1],
        vision_feature_select_strategy="full",
        qformer_config={
            "model_type": "blip_2_qformer",
            "encoder_hidden_size": 36,
            "num_hidden_layers": 1,
            "cross_attention_frequency": 1,
        },
    ),
    "minicpmv4_6": sees(
        "minicpmv4_6",
        1,
        navit,
        text_config={
            "model_type": "qwen3_5_text",
            "num_hidden_layers": 3,
            "layer_types": LINEAR_FIRST,
        },
        insert_layer_id=0,
        image_size=32,
        vision_config=dict(insert_layer_id=0),
    ),
    "exaone4_5": wrapped(
        "exaone4_5",
        AROUND,
        "exaone4",
        "exaone4_5_vision",
        grid(),
        vision_config=dict(window_size=32, fullatt_block_indexes=[1]),
    ),
    "aria": wrapped(
        "aria",
        4,
        "aria_text",
        "idefics3_vision",
        projector_patch_to_query_dict={16: 4},
        text_config=dict(num_key_value_heads=KV_HEADS),
    ),
    "chameleon": sees(
        "chameleon",
        4,
        pixels(3, 4, 4),
        vocabulary_map=visual_words("IMGIMG{}Z"),
        vq_config=dict(VQ, embed_dim=8, latent_channels=8, resolution=4, attn_resolutions=[]),
    ),
    "qwen2_5_omni": sees(
        "qwen2_5_omni_thinker",
        AROUND,
        grid(),
        **OMNI,
        text_config=dict(rope_parameters=MROPE_SHORT),
    ),
    "qwen3_omni_moe": sees(
        "qwen3_omni_moe_thinker", AROUND, grid(), **OMNI, text_config=dict(rope_parameters=MROPE)
    ),
    "qianfan_ocr": sees(
        "qianfan_ocr",
        4,
        PICTURE,
        text_config={"model_type": "qwen3"},
        vision_config=dict(image_size=[32, 32], patch_size=[8, 8]),
    ),
    "emu3": sees(
        "emu3",
        6,
        pixels(3, 4, 4, image_sizes=[4, 4]),
        vocabulary_map=visual_words("<|visual token {:06d}|>"),
        vq_config=dict(
            VQ, codebook_size=11, hidden_size=32, num_attention_heads=1, attn_resolutions=[]
        ),
    ),
    "gemma4_unified": sees(
        "gemma4_unified",
        4,
        patches(4, 3 * 6 * 6),
        text_config=GEMMA4,
        audio_config=None,
        vision_config=dict(
            patch_size=2,
            pooling_kernel_size=3,
            mm_embed_dim=36,
            mm_posemb_size=8,
            output_proj_dims=36,
        ),
    ),
    "muse_glimmer": sees(
        "muse_glimmer",
        4,
        grid(),
        out_hidden_size=144,
        projector_hidden_size=40,
        vision_config=dict(pos_emb_height=4, pos_emb_width=4),
    ),
    "step3p7": sees(
        "step3p7",
        1,
        PICTURE,
        text_config=dict(
            mlp_layer_types=["dense", "sparse"], layer_types=["full_attention", "sliding_attention"]
        ),
    ),
    "minimax_m3_vl": wrapped(
        "minimax_m3_vl",
        4,
        "minimax_m3_vl_text",
        "minimax_m3_vl_vision",
        grid(),
        projector_hidden_size=40,
    ),
    "inkling": sees(
        "inkling_mm_model",
        1,
        pixels(2, 8, 8, 3),
        vision_config=dict(text_hidden_size=HIDDEN),
        audio_config=dict(text_hidden_size=HIDDEN, mel_vocab_size=5, n_mel_bins=4),
        text_config=dict(
            logits_mup_width_multiplier=2.0,
            d_rel=4,
            rel_extent=32,
            swa_num_attention_heads=8,
            swa_num_key_value_heads=2,
            swa_head_dim=14,
            sliding_window_size=64,
            layer_types=["hybrid_sliding", "hybrid"],
            mlp_layer_types=["dense", "sparse"],
        ),
    ),
    "qwen2_audio": sees(
        "qwen2_audio",
        (AUDIO,) * 8,
        sound,
        text_config={"model_type": "qwen2"},
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 8,
            "max_source_positions": 16,
        },
    ),
    "voxtral": sees(
        "voxtral",
        (AUDIO,) * 4,
        pixels(8, 32, name="input_features"),
        text_config={"model_type": "llama"},
        audio_config={
            "model_type": "voxtral_encoder",
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "intermediate_size": 144,
        },
    ),
    "granite_speech": sees(
        "granite_speech",
        (AUDIO,) * 3,
        pixels(15, 10, name="input_features"),
        text_config={"model_type": "granite"},
        encoder_config=dict(
            input_dim=10,
            num_layers=1,
            hidden_dim=24,
            num_heads=2,
            output_dim=7,
            context_size=15,
            max_pos_emb=16,
        ),
        projector_config={
            "model_type": "blip_2_qformer",
            "encoder_hidden_size": 24,
            "vocab_size": 9,
        },
    ),
    "mllama": sees(
        "mllama",
        1,
        pixels(1, 1, 3, 16, 16, aspect_ratio_ids=[1], aspect_ratio_mask=[[1]]),
        text_config=dict(
            num_hidden_layers=3,
            cross_attention_layers=[1],
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        vision_config=dict(
            num_global_layers=1,
            image_size=16,
            vision_output_dim=72,
            intermediate_layers_indices=[0],
            max_num_tiles=1,
            supported_aspect_ratios=[[1, 1]],
        ),
    ),
}
