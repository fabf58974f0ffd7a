"""Models that see, in vLLM, answer questions about pictures as they do in transformers."""

import pytest
from served import by_transformers, by_vllm, largest_difference
from shapes import SHAPES
from tiny import PICTURES, noisy
from transformers import AutoProcessor

from hipp_ext import load_pruned, prune, save_pruned

CASES = [("llava", "blocks"), ("qwen2_5_vl", "uniform"), *((name, "free") for name in PICTURES)]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_the_answers_are_those_of_transformers(name, shape, tmp_path):
    model, processor, prompts = PICTURES[name]()
    save_pruned(prune(noisy(model), SHAPES[shape](model)), tmp_path / "pruned")
    processor.save_pretrained(tmp_path / "pruned")
    processor = AutoProcessor.from_pretrained(tmp_path / "pruned")
    theirs = by_transformers(load_pruned(tmp_path / "pruned"), prompts, processor)
    difference = largest_difference(by_vllm(tmp_path / "pruned", prompts), theirs)
    print(f"{name} {shape}: {difference:.1e} nats")
    assert difference < 1e-3
    # Other pictures, other answers: the pictures were looked at.
    swapped = [(text, prompts[0][1]) for text, _ in prompts[1:3]]
    other = by_transformers(load_pruned(tmp_path / "pruned"), swapped, processor)
    assert [a.logprobs for a in other] != [a.logprobs for a in theirs[1:3]]
