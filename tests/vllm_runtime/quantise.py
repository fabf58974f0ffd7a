"""Prunes and quantises the testbed's LLaVA: `python quantise.py FOLDER W8A8`.

Runs in the environment that has llm-compressor; vLLM's has another version of compressed-tensors.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from plans import random_scores  # noqa: E402
from tiny import noisy  # noqa: E402
from tiny_llava import llava, llava_72  # noqa: E402
from transformers import LlavaForConditionalGeneration  # noqa: E402

from hipp_ext import save_pruned  # noqa: E402
from hipp_ext.budget import Bounds, keep_counts  # noqa: E402
from hipp_ext.groups import find_groups  # noqa: E402
from hipp_ext.integrations.llm_compressor import HippStructuredPruningModifier  # noqa: E402
from hipp_ext.units import plan_from_counts  # noqa: E402

# The integration comes first: it keeps llm-compressor's import in bounds.
from llmcompressor import oneshot  # noqa: E402 isort: skip
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: E402 isort: skip

IGNORE = ["re:.*lm_head", "re:.*vision.*", "re:.*projector.*"]
GROUP = dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
# Model, quantiser, and the multiple of columns that stay: vLLM's CPU kernel for 4 bits wants 32.
QUANTISERS = {
    "W8A8": (llava_72, dict(scheme="W8A8", targets=["Linear"]), 1),
    "W4A16": (llava, dict(config_groups={"group_0": dict(targets=["Linear"], weights=GROUP)}), 32),
}


def main(folder: str, name: str) -> None:
    """Write the model of QUANTISERS `name` to `folder`."""
    build, arguments, round_to = QUANTISERS[name]
    torch.manual_seed(0)
    model, processor, _ = build()
    with tempfile.TemporaryDirectory() as dense:  # llm-compressor wants a model from a disk
        save_pruned(noisy(model), dense, processor, overwrite=True)
        model = LlavaForConditionalGeneration.from_pretrained(dense)
        groups = find_groups(model)
        allocation = [float(i % 3) for i in range(len(groups))]
        counts = keep_counts(groups, allocation, 0.4, Bounds(round_to=round_to))
        plan = plan_from_counts(groups, counts, random_scores(groups))
        modifiers = [
            HippStructuredPruningModifier(plan=plan),
            QuantizationModifier(**arguments, ignore=IGNORE),
        ]
        oneshot(model=model, recipe=modifiers, pipeline="datafree")
        save_pruned(model, folder, processor)


if __name__ == "__main__":
    main(*sys.argv[1:])
