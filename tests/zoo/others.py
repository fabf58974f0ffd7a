"""Models that take pictures or sounds in a way of their own."""

from zoo.family import Family, sees
from zoo.language import GEMMA3N, GEMMA4
from zoo.pictures import PICTURE, flattened, patches, pixels, sound, visual_words
from zoo.sizes import AUDIO, HIDDEN, VOCAB

VQ = dict(base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1, num_embeddings=11)


OTHERS: dict[str, Family] = {
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
    "fuyu": sees(
        "fuyu",
        4,
        pixels(4, 192, name="image_patches"),
        text_config={"model_type": "persimmon", "num_attention_heads": 4},
        patch_size=8,
        image_size=16,
        num_attention_heads=4,
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
    "chameleon": sees(
        "chameleon",
        4,
        pixels(3, 4, 4),
        vocabulary_map=visual_words("IMGIMG{}Z"),
        vq_config=dict(VQ, embed_dim=8, latent_channels=8, resolution=4, attn_resolutions=[]),
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
    "step3p7": sees(
        "step3p7",
        1,
        PICTURE,
        text_config=dict(
            mlp_layer_types=["dense", "sparse"], layer_types=["full_attention", "sliding_attention"]
        ),
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
