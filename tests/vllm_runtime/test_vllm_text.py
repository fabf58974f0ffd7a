"""Language models in vLLM answer as they do in transformers."""

import pytest
from served import by_transformers, by_vllm, largest_difference
from shapes import SHAPES
from tiny import TEXT, noisy, texts

from hipp_ext import load_pruned, prune, save_pruned

CASES = [
    *(("llama", shape) for shape in SHAPES),
    ("mistral", "free"),
    ("mistral", "blocks"),
    ("qwen2", "free"),
    ("qwen2", "uniform"),
    ("qwen2", "blocks"),
    ("qwen3", "free"),
    ("qwen3", "blocks"),
    ("gemma3_text", "free"),
    ("gemma3_text", "blocks"),
]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_the_answers_are_those_of_transformers(name, shape, tmp_path):
    model = noisy(TEXT[name]())
    save_pruned(prune(model, SHAPES[shape](model)), tmp_path / "pruned")
    prompts = texts()
    theirs = by_transformers(load_pruned(tmp_path / "pruned"), prompts)
    difference = largest_difference(by_vllm(tmp_path / "pruned", prompts), theirs)
    print(f"{name} {shape}: {difference:.1e} nats")
    assert difference < 1e-3
