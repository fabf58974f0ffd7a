"""A LLaVA that llm-compressor pruned and quantised, in vLLM."""

import os
import subprocess
from pathlib import Path

import pytest
from served import by_transformers, by_vllm, largest_difference
from tiny_llava import llava

from hipp_ext import load_pruned

# Of log probabilities [nats]. Where an activation lies between two of its 8-bit steps, the last bit
# of a sum decides, and vLLM adds in another order.
TOLERANCE = {"W8A8": 1e-3, "W4A16": 1e-3}


@pytest.mark.parametrize("name", TOLERANCE)
def test_the_answers_are_those_of_transformers(name, tmp_path):
    script = Path(__file__).parent / "quantise.py"
    python = os.environ.get("HIPP_PYTHON", ".venv/bin/python")
    folder = tmp_path / name
    subprocess.run([python, script, folder, name], check=True, cwd=Path(__file__).parents[2])
    _, processor, prompts = llava()
    theirs = by_transformers(load_pruned(folder), prompts, processor)
    difference = largest_difference(by_vllm(folder, prompts), theirs)
    print(f"{name}: {difference:.1e} nats")
    assert difference < TOLERANCE[name]
