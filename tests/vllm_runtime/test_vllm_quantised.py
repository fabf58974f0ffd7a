"""A LLaVA that llm-compressor pruned and quantised, in vLLM."""

import os
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from served import by_transformers, by_vllm, differences, largest_difference
from tiny_llava import llava

from hipp_ext import load_pruned


@pytest.fixture
def quantised(tmp_path):
    """Name of a quantiser -> folder; made in the environment that has llm-compressor."""

    def make(name: str) -> Path:
        script = Path(__file__).parent / "quantise.py"
        python = os.environ.get("HIPP_PYTHON", ".venv/bin/python")
        root = Path(__file__).parents[2]
        subprocess.run([python, script, tmp_path / name, name], check=True, cwd=root)
        return tmp_path / name

    return make


def round_as_vllm(model: Any) -> int:
    """Have the quantised layers round their inputs in steps of a 127th of each token's maximum.

    compressed-tensors takes steps of a 127.5th when it emulates such layers. Returns their number.
    """
    layers = [m for m in model.modules() if getattr(m, "quantization_scheme", None) is not None]
    for layer in layers:

        def forward(x: torch.Tensor, layer: Any = layer) -> torch.Tensor:
            step = x.abs().amax(-1, keepdim=True) / 127
            rounded = (x / step).round().clamp(-128, 127) * step
            return torch.nn.functional.linear(rounded, layer.weight, layer.bias)

        layer.forward = forward
    return len(layers)


def test_w8a8_answers_as_in_transformers(quantised):
    folder = quantised("W8A8")
    _, processor, prompts = llava()
    model = load_pruned(folder)
    emulated = by_transformers(model, prompts, processor)
    ours = by_vllm(folder, prompts)
    assert round_as_vllm(model) == 7 * model.config.text_config.num_hidden_layers
    found = differences(ours, by_transformers(model, prompts, processor))
    print(f"W8A8: {largest_difference(ours, emulated):.1e} nats; with equal steps half of the ")
    print(
        f"tokens {median(found):.1e}, three quarters {sorted(found)[90]:.1e}, all {max(found):.1e}"
    )
    assert largest_difference(ours, emulated) < 0.05
    # The last bit of a sum decides on which side of a step some inputs are rounded to.
    assert median(found) < 1e-3
    assert max(found) < 0.05


def test_w4a16_answers_as_in_transformers(quantised):
    """vLLM's kernel on CPUs computes in 16 bits, so answers may part where two are as likely."""
    folder = quantised("W4A16")
    _, processor, prompts = llava()
    theirs = by_transformers(load_pruned(folder), prompts, processor)
    ours = by_vllm(folder, prompts, dtype="float16")
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.tokens[0] == b.tokens[0]]
    difference = max(abs(a.logprobs[0] - b.logprobs[0]) for a, b in pairs)
    print(f"W4A16: {len(pairs)} of {len(ours)} first tokens, {difference:.1e} nats")
    assert len(pairs) >= 18
    assert difference < 0.02
