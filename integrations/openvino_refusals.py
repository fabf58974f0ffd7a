"""What can be exported to OpenVINO, as far as a configuration says it."""

from collections.abc import Iterator
from typing import Any

from hipp_ext.surgery.layer_config import quiet_width_warnings

TEXT = ("llama", "mistral", "qwen2", "qwen3")
VISION = "clip_vision_model"
ROPE_SCALINGS = ("default", "linear", "llama3", "yarn")  # the others depend on the text's length


def refusals(config: Any) -> tuple[str, ...]:
    """Why `export_openvino` cannot export a model; empty if it can.

    Uneven widths, dropped blocks and dropped layers are no reason: a graph has them as they are.

    Args:
        config: the transformers configuration of the model.

    Returns:
        One clause for each reason, such as "its rotary embedding is scaled by dynamic".
    """
    quiet_width_warnings()
    text = config.get_text_config(decoder=True)
    return (*_of_wrapper(config, text), *_of_text(text))


def _of_wrapper(config: Any, text: Any) -> Iterator[str]:
    """What the parts around the language tower rule out."""
    if getattr(config, "quantization_config", None) is not None:
        yield "its weights are quantised; export the folder from before that"
    if text is config:
        return
    if config.model_type != "llava":
        yield (
            f"it is a vision-language model of the kind {config.model_type}, and only llava is "
            "known"
        )
    elif (vision := config.vision_config.model_type) != VISION:
        yield f"its vision tower is {vision}, and openvino_genai prepares pictures for CLIP only"


def _of_text(text: Any) -> Iterator[str]:
    """What the language tower rules out."""
    if text.model_type not in TEXT:
        yield f"its language tower is {text.model_type}, and only {', '.join(TEXT)} are known"
        return
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention" if window else ""]
    if "sliding_attention" in kinds:
        yield f"its attention has a sliding window of {window} tokens"
    rope = getattr(text, "rope_parameters", None) or {}
    if "mrope_section" in rope:
        yield "its positions have three axes (M-RoPE)"
    if (scaling := rope.get("rope_type", "default")) not in ROPE_SCALINGS:
        yield f"its rotary embedding is scaled by {scaling}"
