"""What transformers calls the parts of its models, and how its blocks norm, gate and scale what
they add.

This is the only table of such facts. A model family that needs another name or another rule gets it
here; everything else in the library finds its way by structure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

Layout = Literal["parts", "units"]  # of the rows of a fused projection

VISION_TOWERS = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_tower")
# What leads from the vision tower to the language tower; some of it lies in the vision tower.
PROJECTORS = (
    "multi_modal_projector",
    "merger",
    "deepstack_merger_list",
    "vision_adapter",
    "vision_projection",
    "projector",
    "aligner",
    "connector",
    "mm_projector",
)
HEADS = ("num_attention_heads", "num_heads", "attention_heads")  # of a vision tower
# Inputs of a model's forward that hold pictures; those of videos have names of their own.
PICTURES = ("pixel_values", "pixel_values_images", "image_patches")
IMAGE_TOKENS = ("image_token_id", "image_token_index")
LOGIT_CAPS = ("final_logit_softcapping", "logits_soft_cap")
HEAD_DIMS = ("head_dim", "head_size")  # attributes of attention blocks
# Configuration fields that have the width of an FFN computed from the one that is named (LFM2).
ROUNDING = ("block_auto_adjust_ff_dim",)
# Attention blocks whose fused projection lies in several parts, each with queries, keys and values.
SCATTERED = ("CodeGenAttention",)
LINEAR_LAYERS = ("FalconLinear",)  # classes that compute what nn.Linear does
# The same, with a weight of (inputs, outputs): GPT-2 and what was made after it.
TRANSPOSED_LAYERS = ("Conv1D",)
# Layers that norm the sum of the residual stream and a block: those of the first GPT.
NORMED_SUMS = ("modeling_openai.Block",)
# Arguments of attention blocks: a bias for every head, which the model makes of their number.
HEAD_BIASES = ("alibi", "position_bias")
QUERY_WIDTHS = ("embed_dim", "split_size")  # of all query heads of an attention block together
VALUE_DIM = "v_head_dim"  # the same, where values are narrower than keys
CACHES = ("past_key_values", "layer_past")  # arguments of attention blocks that hold the cache
# What a block calls the number of its layer in a cache.
CACHE_LAYER = ("layer_idx", "layer_id")
SHARED_KEYS = "shared_kv_states"  # argument of layers: what some of them leave for later ones
# Config fields that list the numbers of some layers, and such that count the first layers.
LAYER_NUMBERS = ("cross_attention_layers", "mlp_only_layers", "moe_layers")
FIRST_LAYERS = ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers")
# Other names of configuration fields, which count first: Llama 4, OPT, GPT-J, Falcon, Granite.
FIELD_NAMES = {
    "intermediate_size": (
        "intermediate_size_mlp",
        "ffn_dim",
        "n_inner",
        "ffn_hidden_size",
        "shared_intermediate_size",
    )
}
LAYER_LISTS = ("layers", "h", "blocks")  # a tower's own name of the list of its layers
# Small parts of layers beside the blocks, which no unit owns a part of: they stay (Gemma 3n, 4).
SIDE_PATHS = ("altup", "laurel", "per_layer_input_gate", "per_layer_projection")


@dataclass(frozen=True, kw_only=True)
class BlockNames:
    """Names of the parts that the blocks in one place of a layer have in transformers.

    Attributes:
        producers: sets of linear layers whose outputs belong to units; a block has one of the sets.
        fused: for a set of one layer that holds several projections: how its rows lie. "parts": all
            rows of the first projection, then all of the next (queries, keys, values; gate, up).
            "units": the rows of a unit side by side.
        gates: linear layers that some blocks have beside, with rows for every unit.
        consumers: the linear layer that reads the units; a block has one of them.
        norms_before: norms of a block's input, most specific name first.
        norms_after: norms of a block's output, before it is added to the residual stream.
        gate: parameter whose tanh scales what the block adds (Llama 3.2 Vision).
        skip: what `per_layer_config[i].skip` calls the block.
    """

    producers: tuple[tuple[str, ...], ...]
    fused: Mapping[str, Layout]
    gates: tuple[str, ...]
    consumers: tuple[str, ...]
    norms_before: tuple[str, ...]
    norms_after: tuple[str, ...]
    gate: str
    skip: str


# By place: every layer has an attention block and a feed-forward one.
BLOCKS = {
    "attention": BlockNames(
        producers=(
            ("q_proj", "k_proj", "v_proj"),
            ("q_proj", "k_proj"),  # values are the keys (Gemma 4)
            ("q_proj",),  # keys and values are those of an earlier layer (Gemma 3n, Gemma 4)
            ("qkv_proj",),
            ("query_key_value",),
            ("qkv",),
            ("c_attn",),
        ),
        fused={"qkv_proj": "parts", "qkv": "parts", "c_attn": "parts", "query_key_value": "units"},
        gates=("gate_proj", "g_proj"),
        consumers=("o_proj", "out_proj", "dense", "Wo", "proj", "projection_layer", "c_proj"),
        norms_before=(
            "input_layernorm",
            "attention_layernorm",
            "layer_norm1",
            "norm1",
            "layernorm_before",
            "attention_norm",
            "rms_norm1",
            "operator_norm",
            "temporal_pre_norm",
            "attn_norm",
            "ln_1",
        ),
        norms_after=("post_self_attn_layernorm", "post_attention_layernorm"),
        gate="cross_attn_attn_gate",
        skip="attention",
    ),
    "ffn": BlockNames(
        producers=(
            ("gate_proj", "up_proj"),
            ("gate_up_proj",),
            ("input_linear",),
            ("w1", "w3"),
            ("up_proj",),
            ("fc1",),
            ("c_fc",),
            ("fc_in",),
            ("dense_h_to_4h",),
            ("Wi",),
            ("linear_fc1",),
            ("linear_1",),
            ("linear1",),
            ("0",),  # of a sequence: linear layer, activation, linear layer
        ),
        fused={"gate_up_proj": "parts", "input_linear": "parts", "Wi": "parts"},
        gates=(),
        consumers=(
            "down_proj",
            "w2",
            "fc2",
            "c_proj",
            "fc_out",
            "output_linear",
            "dense_4h_to_h",
            "Wo",
            "linear_fc2",
            "linear_2",
            "linear2",
            "2",
        ),
        norms_before=(
            "pre_feedforward_layernorm",
            "pre_ff_layernorm",
            "feedforward_layernorm",
            "post_attention_layernorm",
            "layer_norm2",
            "norm2",
            "layernorm_after",
            "ffn_norm",
            "rms_norm2",
            "channel_pre_norm",
            "mlp_norm",
            "ln_2",
        ),
        norms_after=("post_feedforward_layernorm", "post_mlp_layernorm"),
        gate="cross_attn_mlp_gate",
        skip="mlp",
    ),
}

# Attention whose queries, keys and values are up-projected from latents.
LATENT_ATTENTION = replace(
    BLOCKS["attention"],
    producers=(("q_b_proj", "kv_b_proj"), ("q_proj", "kv_b_proj")),
    consumers=("o_proj",),
)
# Parts of a mixture of experts, which are children of the block.
EXPERTS = "experts"
ROUTERS = ("gate", "router")
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # configuration fields
EXPERT_WIDTHS = ("moe_intermediate_size", "intermediate_size")
# Mixtures that return their router's scores beside their outputs.
ROUTED_WITH_LOGITS = ("GptOssMLP", "Llama4TextMoe")
SHARED_EXPERTS = ("shared_expert", "shared_experts", "shared_mlp", "shared_expert_gate")
LATENT_PARTS = {"q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm", "indexer"}


def norm_before(layer: nn.Module, place: str) -> nn.Module | None:
    """The norm of a block's input; None where blocks norm their outputs or share another's norm."""
    if _norms_sums(layer):
        return None
    found = _norm_names(layer, place)
    # Without a norm before attention, the norm behind it belongs to its output (EXAONE 4, OLMo 2).
    return getattr(layer, found[0]) if found and _norm_names(layer, "attention") else None


def residual_scale(layer: nn.Module, place: str) -> float:
    """What a block's output is multiplied by before it is added to the residual stream.

    Granite has a number for it, and the cross-attention layers of Llama 3.2 Vision have gates.
    """
    gate = getattr(layer, BLOCKS[place].gate, None)
    if gate is not None:
        return float(gate.detach().tanh().abs())
    beta = {"attention": "attn_beta_factor", "ffn": "mlp_beta_factor"}[place]  # MiniMax
    return float(getattr(layer, "residual_multiplier", getattr(layer, beta, 1.0)))


def residual_stream(layer: Any, hidden: Tensor) -> Tensor:
    """The stream (batch, tokens, hidden) that the blocks of a layer add to.

    Gemma 3n has several, of which one is active.
    """
    return hidden[layer.config.altup_active_idx] if hasattr(layer, "altup") else hidden


def norms_residual(layer: nn.Module) -> bool:
    """Whether the residual stream goes on behind the norms instead of around them: MiniMax, GPT."""
    return hasattr(layer, "attn_alpha_factor") or _norms_sums(layer)


def lends_keys(block: Any) -> bool:
    """Whether later layers attend to the keys and values of an attention block (Gemma 3n)."""
    shared = getattr(getattr(block, "config", None), "num_kv_shared_layers", 0)
    return bool(shared and getattr(block, "store_full_length_kv", False))


def fused_layout(block: Any, layer: str) -> Layout | None:
    """How the rows of an attention block's projection `layer` lie; None: it is not fused.

    Those of GPT-BigCode lie head by head where every head has keys of its own.
    """
    if layer == "c_attn" and getattr(block, "multi_query", True) is False:
        return "units"
    return BLOCKS["attention"].fused.get(layer)


def borrows_keys(block: Any) -> bool:
    """Whether an attention block attends to the keys and values of an earlier layer."""
    return bool(getattr(block, "is_kv_shared_layer", False))


def borrowed_kv_heads(block: Any) -> int:
    """Number of key heads that an attention block borrows: none is ever pruned."""
    config = block.config
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[block.layer_idx]
    return config.num_key_value_heads


def common_value(config: Any, name: str) -> Any:
    """What a configuration says in a field of all layers; None where it has none, or they differ.

    Gemma 3n has a list of widths. Gemma 4 raises where layers differ.
    """
    try:
        value = getattr(config, name, None)
    except RuntimeError:
        return None
    if not isinstance(value, list):
        return value
    return value[0] if value and value.count(value[0]) == len(value) else None


def field_name(config: Any, name: str) -> str:
    """What a configuration calls the field `name`; empty if it has no such field."""
    known = (*FIELD_NAMES.get(name, ()), name)
    return next((n for n in known if n in vars(config) or n in config.attribute_map), "")


def crosses(layer: nn.Module) -> bool:
    """Whether the layer's attention reads the image's features instead of the text (Llama 3.2
    Vision).
    """
    return hasattr(layer, "cross_attn")


def first_removable_layer(config: Any) -> int:
    """Layers below this one cannot leave a language tower: features are added by their number.

    Qwen3-VL adds what its vision tower computed at several depths after its first layers.
    """
    vision = getattr(config, "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


def varies_by_itself(config: Any) -> bool:
    """Whether layers differ in size before anything is pruned (Gemma 4).

    Such a class reads its `per_layer_config` by types of layers, which must stay alike in it, and
    sizes that vary cannot be read for all layers. Pruning leaves it as it is.
    """
    if not getattr(config, "is_heterogeneous", False):
        return False
    if config.allow_global_per_layer_attribute_access:  # pruning sets it
        return False
    own = config.to_dict()["per_layer_config"].values()
    return any("head_dim" in values for values in own)


def drop_layers(config: Any, removed: Sequence[int]) -> None:
    """Take the layers `removed` out of everything that a text configuration says layer by layer."""
    count = config.num_hidden_layers
    if (step := getattr(config, "decoder_sparse_step", 1)) > 1:  # then every layer is named
        dense = {i for i in range(count) if (i + 1) % step} | set(config.mlp_only_layers)
        config.mlp_only_layers, config.decoder_sparse_step = sorted(dense), 1
    for name in FIRST_LAYERS:
        if isinstance(first := getattr(config, name, None), int):
            setattr(config, name, first - sum(i < first for i in removed))
    kept = [i for i in range(count) if i not in set(removed)]
    own = {int(i): of for i, of in (config.to_dict().get("per_layer_config") or {}).items()}
    config.per_layer_config = None  # entries of layers that are not there are an error
    for name, value in list(vars(config).items()):
        if name in LAYER_NUMBERS and value:
            setattr(config, name, [kept.index(i) for i in value if i in kept])
        elif isinstance(value, list) and len(value) == count:
            setattr(config, name, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)
    config.per_layer_config = {kept.index(i): of for i, of in own.items() if i in kept} or None


def norm_after(layer: nn.Module, place: str) -> nn.Module | None:
    """The norm of a block's output before it is added; None where it is added as it is."""
    return next((getattr(layer, n) for n in norms_after(layer, place)), None)


def norms_after(layer: nn.Module, place: str) -> list[str]:
    """Names of the norms behind a block, which read nothing but its output."""
    ffn_input = norm_before(layer, "ffn")
    names = [n for n in BLOCKS[place].norms_after if is_norm(layer, n)]
    return [n for n in names if getattr(layer, n) is not ffn_input]


def _norms_sums(layer: nn.Module) -> bool:
    """Whether the norms stand behind the sums of stream and block."""
    return f"{type(layer).__module__}.{type(layer).__name__}".endswith(NORMED_SUMS)


def _norm_names(layer: nn.Module, place: str) -> list[str]:
    return [name for name in BLOCKS[place].norms_before if is_norm(layer, name)]


def is_norm(layer: nn.Module, name: str) -> bool:
    """Whether `layer` has a norm called `name`; some layers have None instead."""
    return isinstance(getattr(layer, name, None), nn.Module)
