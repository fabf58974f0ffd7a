"""A vision tower, a projector and a language model, each of a class of its own."""

from typing import Any

from zoo.family import Family, Inputs, sees
from zoo.language import LINEAR_FIRST
from zoo.pictures import PICTURE, navit, pixels, two_resolutions
from zoo.sizes import HIDDEN, KV_HEADS

TOWERS = dict(
    clip="clip_vision_model", siglip="siglip_vision_model", siglip2="siglip2_vision_model"
)


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


WRAPPERS: dict[str, Family] = {
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
    "internvl": sees(
        "internvl",
        4,
        PICTURE,
        text_config={"model_type": "qwen2"},
        vision_config=dict(image_size=[32, 32], patch_size=[8, 8]),
    ),
    "qianfan_ocr": sees(
        "qianfan_ocr",
        4,
        PICTURE,
        text_config={"model_type": "qwen3"},
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
    "mistral3": wrapped(
        "mistral3", 4, "mistral", "pixtral", inputs=pixels(3, 32, 32, image_sizes=[32, 32])
    ),
    "lighton_ocr": wrapped(
        "lighton_ocr", 4, "qwen3", "pixtral", inputs=pixels(3, 32, 32, image_sizes=[32, 32])
    ),
    "aya_vision": wrapped("aya_vision", 4, "cohere2", "siglip"),
    "cohere2_vision": wrapped(
        "cohere2_vision", 4, "cohere2", "siglip", alignment_intermediate_size=40
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
    "got_ocr2": sees(
        "got_ocr2",
        1,
        PICTURE,
        text_config={"model_type": "qwen2"},
        vision_config=dict(output_channels=12, global_attn_indexes=[1], window_size=2),
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
    "aria": wrapped(
        "aria",
        4,
        "aria_text",
        "idefics3_vision",
        projector_patch_to_query_dict={16: 4},
        text_config=dict(num_key_value_heads=KV_HEADS),
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
}
