"""Language models."""

from zoo.family import Family, language
from zoo.sizes import HEADS, HIDDEN

LINEAR_FIRST = ["linear_attention", "full_attention", "linear_attention"]
CONVOLUTION_FIRST = ["conv", "full_attention", "conv"]
EXTRA_LATENT = {
    "mistral4": {"architecture": "Mistral4ForCausalLM"},
    "deepseek_v32": {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2},
    "minicpm3": {"dim_model_base": 24},
    "youtu": {"tie_word_embeddings": False},  # transformers 5.17 does not tie them again
}
GEMMA3N = dict(
    num_hidden_layers=4,
    num_kv_shared_layers=2,
    layer_types=["sliding_attention", "full_attention"] * 2,
    activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
)
GEMMA4 = dict(
    num_hidden_layers=4,
    num_kv_shared_layers=2,
    layer_types=["sliding_attention", "full_attention"] * 2,
    global_head_dim=24,
)

LANGUAGE_MODELS: dict[str, Family] = {
    name: language(name)
    for name in [
        "llama",
        "mistral",
        "ministral",
        "ministral3",
        "qwen2",
        "qwen3",
        "qwen2_moe",
        "qwen3_moe",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi3",
        "gpt2",
        "gpt_neox",
        "gpt_bigcode",
        "opt",
        "falcon",
        "bloom",
        "mpt",
        "mixtral",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "smollm3",
        "granitemoe",
        "cohere",
        "cohere2",
        "stablelm",
        "starcoder2",
        "glm",
        "glm4",
        "glm4_moe",
        "exaone4",
        "gpt_oss",
        "nemotron",
        "seed_oss",
        "ernie4_5",
        "hunyuan_v1_dense",
        "apertus",
        "arcee",
        "diffllama",
        "bitnet",
        "nanochat",
        "vaultgemma",
        "doge",
        "cwm",
        "jais2",
        "minimax_m2",
        "dots1",
        "ernie4_5_moe",
        "phimoe",
        "xglm",
        "biogpt",
        "exaone_moe",
        "jetmoe",
        "hunyuan_v1_moe",
        "flex_olmo",
        "afmoe",
        "granite_swa",
    ]
}
LANGUAGE_MODELS |= {
    name: language(name, num_key_value_heads=HEADS, **EXTRA_LATENT.get(name, {}))
    for name in ["youtu", "minicpm3", "deepseek_v2", "deepseek_v3", "deepseek_v32", "mistral4"]
}
LANGUAGE_MODELS |= {
    "phi": language("phi", num_attention_heads=4, num_key_value_heads=2),
    "persimmon": language("persimmon", num_attention_heads=4),
    "helium": language("helium", head_dim=HIDDEN // HEADS),
    "lfm2": language(
        "lfm2", block_multiple_of=4, num_hidden_layers=3, layer_types=CONVOLUTION_FIRST
    ),
    "lfm2_moe": language("lfm2_moe", num_hidden_layers=3, layer_types=CONVOLUTION_FIRST),
    "qwen3_next": language("qwen3_next", num_hidden_layers=3, layer_types=LINEAR_FIRST),
    "qwen3_5_text": language("qwen3_5_text", num_hidden_layers=3, layer_types=LINEAR_FIRST),
    "gemma3n_text": language("gemma3n_text", **GEMMA3N),
    "gemma3n_noshare": language("gemma3n_text", num_kv_shared_layers=0),
    "gemma4_text": language("gemma4_text", **GEMMA4),
    "gemma4_noshare": language("gemma4_text", num_kv_shared_layers=0, global_head_dim=24),
    "gptj": language("gptj", rotary_dim=4),
    "codegen": language("codegen", rotary_dim=4),
    "gpt_neo": language("gpt_neo", attention_types=[[["global", "local"], 1]]),
    "granite": language(
        "granite",
        logits_scaling=3.0,
        residual_multiplier=0.4,
        embedding_multiplier=2.0,
        attention_multiplier=0.3,
    ),
    "hyperclovax": language("hyperclovax", logits_scaling=3.0, residual_multiplier=0.4),
    "granitemoehybrid": language(
        "granitemoehybrid",
        num_hidden_layers=3,
        layer_types=["mamba", "attention", "mamba"],
        mamba_d_head=24,
    ),
    "granite_swa_square": language("granite_swa", head_dim=8),
    "bamba": language("bamba", num_hidden_layers=3, attn_layer_indices=[1], mamba_d_head=24),
    "jamba": language(
        "jamba",
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_dt_rank=3,
    ),
    "falcon_h1": language("falcon_h1"),
    "zamba2": language(
        "zamba2",
        num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "mamba"],
        n_mamba_heads=4,
        chunk_size=8,
        mamba_d_state=8,
        use_mem_rope=True,
    ),
    "nemotron_h": language(
        "nemotron_h",
        layers_block_type=["mamba", "attention", "mlp", "moe"],
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=6,
        n_groups=2,
        chunk_size=8,
    ),
    "olmo_hybrid": language("olmo_hybrid", num_hidden_layers=3, layer_types=LINEAR_FIRST),
    "mimo_v2_flash": language("mimo_v2_flash", layer_types=["full_attention", "sliding_attention"]),
    "modernbert_decoder": language("modernbert-decoder"),
    "recurrent_gemma": language("recurrent_gemma", num_hidden_layers=3),
    "minimax": language("minimax", layer_types=["linear_attention", "full_attention"]),
    "mamba2": language("mamba2", num_heads=12, head_dim=8, state_size=8, n_groups=2, chunk_size=8),
    "stablelm_qk": language("stablelm", qk_layernorm=True),
    "stablelm_parallel": language("stablelm", use_parallel_residual=True, use_qkv_bias=True),
    "cohere_qk": language("cohere", use_qk_norm=True),
    "llama_bias": language("llama", attention_bias=True, mlp_bias=True),
    "qwen2_window": language(
        "qwen2",
        sliding_window=4,
        use_sliding_window=True,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
