"""Small configurations of transformers' own classes: all sizes different where a class lets it."""

import dataclasses
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 97, 48, 44, 2, 8, 4, 16
EXPERTS, EXPERT_FFN = 8, 20
# The first tokens of a vocabulary; text starts at TEXT.
PAD, BOS, EOS, IMAGE, VIDEO, START, END, AUDIO, TEXT = 0, 1, 2, 5, 6, 7, 8, 9, 12

TOKENS = dict(
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
    image_token_id=IMAGE,
    image_token_index=IMAGE,
    video_token_id=VIDEO,
    video_token_index=VIDEO,
    vision_start_token_id=START,
    image_start_token_id=START,
    image_bos_token_id=START,
    boi_token_id=START,
    boi_token_index=START,
    im_start_id=START,
    vision_end_token_id=END,
    image_end_token_id=END,
    eoi_token_id=END,
    eoi_token_index=END,
    im_end_id=END,
    video_start_token_id=10,
    video_end_token_id=11,
    audio_token_id=AUDIO,
    audio_token_index=AUDIO,
)
# Fields that the classes of language models have, under all the names that are in use.
LANGUAGE = TOKENS | dict(
    vocab_size=VOCAB,
    vocab_size_per_layer_input=VOCAB,
    max_position_embeddings=256,
    n_positions=256,
    n_ctx=256,
    max_seq_len=256,
    hidden_size=HIDDEN,
    n_embd=HIDDEN,
    d_model=HIDDEN,
    embed_dim=HIDDEN,
    word_embed_proj_dim=HIDDEN,
    hidden_size_per_layer_input=7,
    intermediate_size=FFN,
    n_inner=FFN,
    ffn_dim=FFN,
    ffn_hidden_size=FFN,
    dense_intermediate_size=FFN,
    num_hidden_layers=LAYERS,
    n_layer=LAYERS,
    n_layers=LAYERS,
    num_layers=LAYERS,
    layers=LAYERS,
    num_attention_heads=HEADS,
    n_head=HEADS,
    n_heads=HEADS,
    num_heads=HEADS,
    attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    kv_channels=HEAD_DIM,
    query_pre_attn_scalar=HEAD_DIM,
    sliding_window=64,
    # mixtures of experts
    num_experts=EXPERTS,
    num_local_experts=EXPERTS,
    n_routed_experts=EXPERTS,
    moe_num_experts=EXPERTS,
    num_experts_per_tok=2,
    top_k_experts=2,
    moe_k=2,
    moe_topk=2,
    n_group=2,
    topk_group=1,
    moe_intermediate_size=EXPERT_FFN,
    shared_expert_intermediate_size=28,
    moe_shared_expert_intermediate_size=28,
    shared_intermediate_size=28,
    share_expert_dim=28,
    n_shared_experts=1,
    num_shared_experts=1,
    moe_num_shared_experts=1,
    first_k_dense_replace=1,
    num_dense_layers=1,
    moe_layer_start_index=1,
    num_mtp_layers=0,
    num_nextn_predict_layers=0,
    # latent attention
    kv_lora_rank=14,
    q_lora_rank=18,
    qk_nope_head_dim=10,
    qk_rope_head_dim=4,
    v_head_dim=12,
    # state spaces, convolutions, linear attention
    mamba_d_state=8,
    mamba_d_ssm=32,
    mamba_n_heads=4,
    mamba_d_head=8,
    mamba_chunk_size=8,
    conv_L_cache=3,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=6,
    linear_value_head_dim=10,
    lru_width=HIDDEN,
    use_mamba_kernels=False,
    # Gemma 3n
    laurel_rank=5,
)
# Fields of vision and audio towers.
VISION = TOKENS | dict(
    hidden_size=36,
    d_model=36,
    embed_dim=36,
    intermediate_size=52,
    mlp_dim=52,
    encoder_ffn_dim=52,
    num_hidden_layers=LAYERS,
    depth=LAYERS,
    encoder_layers=LAYERS,
    num_attention_heads=3,
    num_key_value_heads=3,
    num_heads=3,
    encoder_attention_heads=3,
    attention_heads=3,
    image_size=32,
    patch_size=8,
    num_patches=16,
    out_hidden_size=HIDDEN,
    text_hidden_size=HIDDEN,
    output_dim=HIDDEN,
    projection_dim=HIDDEN,
)


def small(cls: type, defaults: dict[str, Any] = LANGUAGE, **given: Any) -> Any:
    """A configuration of `cls` with the sizes of `defaults` where it has such fields.

    Args:
        cls: configuration class, or its name in transformers' registry.
        defaults: LANGUAGE or VISION.
        given: fields that are set instead; a dictionary for the configuration of a part. It may
            name its class as "model_type" where the class of the whole leaves that open.
    """
    cls = CONFIG_MAPPING[cls] if isinstance(cls, str) else cls
    fields = {field.name for field in dataclasses.fields(cls)}
    parts = {}
    for name, part in (cls.sub_configs or {}).items():
        own = given.pop(name, {})
        if own is None or not isinstance(own, dict):
            parts[name] = own
            continue
        of_part = LANGUAGE if name in ("text_config", "encoder_config") else VISION
        named = own.pop("model_type", None)
        parts[name] = small(named or part, of_part, **own)
    values = {
        name: value for name, value in defaults.items() if name in fields and name not in parts
    }
    return cls(**values | parts | given)
