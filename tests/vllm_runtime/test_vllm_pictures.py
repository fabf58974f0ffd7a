"""Models that see, in vLLM, answer questions about pictures as they do in transformers."""

from collections.abc import Callable
from typing import Any

import pytest
from served import by_transformers, by_vllm, largest_difference
from shapes import SHAPES
from tiny import noisy
from tiny_idefics3 import idefics3, smolvlm
from tiny_llava import gemma3, internvl, llava, llava_next, llava_onevision
from tiny_qwen import qwen2_5_vl, qwen2_vl, qwen3_vl
from transformers import AutoProcessor

from hipp_ext import load_pruned, prune, save_pruned

BUILDERS: tuple[Callable[[], tuple[Any, Any, list[Any]]], ...] = (
    llava,
    llava_next,
    llava_onevision,
    internvl,
    gemma3,
    qwen2_vl,
    qwen2_5_vl,
    qwen3_vl,
    idefics3,
    smolvlm,
)
PICTURES = {builder.__name__: builder for builder in BUILDERS}
OTHERS = [
    ("llava", "blocks"),
    ("gemma3", "blocks"),
    ("qwen2_5_vl", "uniform"),
    ("qwen2_5_vl", "blocks"),
]
CASES = [
    *((name, "free") for name in PICTURES),
    *OTHERS,
    ("qwen3_vl", "blocks"),
    ("smolvlm", "blocks"),
]


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
