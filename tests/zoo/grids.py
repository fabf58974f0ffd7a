"""Models that take the patches of all pictures in a row, as Qwen2-VL does."""

from zoo.family import Family, sees
from zoo.language import LINEAR_FIRST
from zoo.pictures import grid
from zoo.sizes import END, HIDDEN, IMAGE, START
from zoo.wrappers import wrapped

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
AROUND = (START, IMAGE, IMAGE, IMAGE, IMAGE, END)


GRIDS: dict[str, Family] = {
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
        "paddleocr_vl", AROUND, grid(shape=(3, 8, 8)), text_config=dict(rope_parameters=MROPE)
    ),
    "exaone4_5": wrapped(
        "exaone4_5",
        AROUND,
        "exaone4",
        "exaone4_5_vision",
        grid(),
        vision_config=dict(window_size=32, fullatt_block_indexes=[1]),
    ),
    "kimi_k25": sees(
        "kimi_k25",
        4,
        grid(shape=(3, 8, 8)),
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
    "muse_glimmer": sees(
        "muse_glimmer",
        4,
        grid(),
        out_hidden_size=144,
        projector_hidden_size=40,
        vision_config=dict(pos_emb_height=4, pos_emb_width=4),
    ),
    "minimax_m3_vl": wrapped(
        "minimax_m3_vl",
        4,
        "minimax_m3_vl_text",
        "minimax_m3_vl_vision",
        grid(),
        projector_hidden_size=40,
    ),
    "video_llama_3": sees(
        "video_llama_3",
        4,
        grid(3 * 8 * 8, image_merge_sizes=2),
        text_config={"model_type": "qwen2"},
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
}
