"""What llama.cpp's graphs can compute, as far as a configuration says it."""

from typing import Any

from hipp_ext.surgery.layer_config import quiet_width_warnings

__all__ = ["ROPE_SCALINGS", "refusals"]

# transformers' name of a language tower -> llama.cpp's name where all layers are alike.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
ROPE_SCALINGS = ("default", "linear", "llama3")
_REASONS = {  # by the beginning of the name of the language tower
    "qwen3": "norms of queries and keys",
    "gemma3": "norms of queries and keys, and norms behind its blocks",
    "gemma": "norms that keep their gain less one",
    "granite": "blocks whose output is scaled",
    "cohere": "attention and FFN side by side",
    "phi3": "fused projections",
    "mllama": "layers that attend to the image",
}
_MOST_LAYERS = 512


def refusals(config: Any) -> tuple[str, ...]:
    """Why llama.cpp cannot run the language tower of a model; empty if it can.

    Uneven widths and dropped blocks are no reason: `export_gguf` writes them as the architecture
    `deci`, whose graph is that of Llama.

    Args:
        config: the transformers configuration of a model, or of its language tower.

    Returns:
        One clause for each reason, such as "its rotary embedding is scaled by yarn".

    Source: src/models/deci.cpp, llama.cpp 75dc8f6.
    """
    quiet_width_warnings()
    text = config.get_text_config(decoder=True)
    return tuple(reason for reason in (*_of_kind(config, text), *_of_values(text)) if reason)


def _of_kind(config: Any, text: Any) -> list[str]:
    """What the model's kind, and the packing of its weights, rule out."""
    reasons = []
    name = str(getattr(text, "model_type", ""))
    rope = _rope(text)
    experts = ("num_local_experts", "num_experts", "n_routed_experts")
    if "mrope_section" in rope or name in ("qwen2_vl_text", "qwen2_5_vl_text"):
        reasons.append(
            "its positions have three axes (M-RoPE), which no graph of uneven layers has"
        )
    elif any(isinstance(getattr(text, e, None), int) for e in experts) or "moe" in name:
        reasons.append(f"its language tower ({name}) is a mixture of experts")
    elif name not in ARCHITECTURES:
        why = next((r for n, r in _REASONS.items() if name.startswith(n)), "a graph of its own")
        reasons.append(
            f"its language tower is {name}, which has {why}; the graph of uneven layers is that of "
            f"{', '.join(ARCHITECTURES)}"
        )
    if getattr(config, "quantization_config", None) is not None:
        reasons.append("its weights are quantised; export the folder from before that")
    return reasons


def _of_values(text: Any) -> list[str]:
    """What single values of the configuration rule out."""
    reasons = []
    if (act := getattr(text, "hidden_act", "silu")) not in ("silu", "swish"):
        reasons.append(f"its activation is {act}, and only silu can be said")
    if window := _window(text):
        reasons.append(f"its attention has a sliding window of {window} tokens")
    rope = _rope(text)
    if (kind := rope.get("rope_type", "default")) not in ROPE_SCALINGS:
        reasons.append(
            f"its rotary embedding is scaled by {kind}, and only {', '.join(ROPE_SCALINGS[1:])} "
            "can be said"
        )
    part = rope.get("partial_rotary_factor", getattr(text, "partial_rotary_factor", None))
    if part not in (None, 1, 1.0):
        reasons.append(f"its rotary embedding turns only a part ({part}) of every head")
    if (layers := getattr(text, "num_hidden_layers", 0)) > _MOST_LAYERS:
        reasons.append(f"it has {layers} layers, and {_MOST_LAYERS} are the most")
    return reasons


def _rope(text: Any) -> dict[str, Any]:
    return dict(getattr(text, "rope_parameters", None) or {})


def _window(text: Any) -> int | None:
    """Length of a sliding window that can be felt; None without one."""
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if window is None or window >= getattr(text, "max_position_embeddings", window + 1):
        return None
    return window if kinds is None or "sliding_attention" in kinds else None
