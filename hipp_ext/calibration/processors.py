"""Which processor, and which image token, belong to a model."""

import contextlib
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from hipp_ext.errors import CalibrationError


def find_processor(model: nn.Module) -> Any | None:
    """The processor (or tokenizer) in the folder that `model` was loaded from, or None."""
    folder = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not folder or not Path(folder).is_dir():
        return None
    from transformers import AutoProcessor, AutoTokenizer

    try:
        return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare ones for a damaged file
        if image_token_id(model) is None:
            # A tokenizer that was saved from a processor still names it; the part for pictures is
            # gone.
            with contextlib.suppress(Exception):
                return AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
        if (Path(folder) / "tokenizer_config.json").exists():
            warnings.warn(f"The processor in {folder} could not be loaded: {error}", stacklevel=2)
        return None


def check_processor(model: nn.Module, processor: Any) -> None:
    """Raise CalibrationError unless `processor` has the model's vocabulary and image token."""
    if processor is None:
        raise CalibrationError(
            "No processor was given, and none lies beside the model's weights: pass processor=."
        )
    tokenizer = getattr(processor, "tokenizer", processor)
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    if len(tokenizer) > rows:
        raise CalibrationError(
            f"This processor does not belong to the model: its vocabulary has {len(tokenizer)} "
            f"tokens, the model {rows}."
        )
    expected, token = image_token_id(model), getattr(processor, "image_token", None)
    if expected is not None and isinstance(token, str):
        actual = tokenizer.convert_tokens_to_ids(token)
        if actual != expected:
            raise CalibrationError(
                f"This processor does not belong to the model: its image token {token!r} has the "
                f"id {actual}, the model expects {expected}."
            )


def image_token_id(model: nn.Module) -> int | None:
    """Id of the token that stands for image features in `input_ids`, or None."""
    config = getattr(model, "config", None)
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None
