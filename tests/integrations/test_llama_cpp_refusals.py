"""What llama.cpp cannot run is said by name, from the configuration alone."""

import pytest
from llama_cpp_runtime import save
from models import BUILDERS, PECULIAR, build
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
)

from hipp_ext import prune
from hipp_ext.errors import UnsupportedModelError
from hipp_ext.integrations.llama_cpp import export_gguf, refusals

ROPE = {"rope_theta": 10000.0}
REFUSED = {
    "qwen3": "language tower is qwen3, which has norms of queries and keys",
    "qwen2_5_vl": "positions have three axes",
    "granite_llava": "granite, which has blocks whose output is scaled",
    "gemma3": "gemma3_text, which has norms of queries and keys",
    "mllama": "mllama_text_model, which has layers that attend to the image",
}
CONFIGS = [
    (MistralConfig(sliding_window=4096), "sliding window of 4096 tokens"),
    (Qwen2Config(use_sliding_window=True, max_window_layers=2), "sliding window of 4096"),
    (MixtralConfig(), r"\(mixtral\) is a mixture of experts"),
    (LlamaConfig(hidden_act="gelu"), "activation is gelu"),
    (LlamaConfig(rope_parameters=ROPE | {"rope_type": "yarn", "factor": 4.0}), "scaled by yarn"),
    (LlamaConfig(rope_parameters=ROPE | {"rope_type": "dynamic", "factor": 2.0}), "by dynamic"),
    (
        LlamaConfig(rope_parameters=ROPE | {"rope_type": "default", "partial_rotary_factor": 0.5}),
        r"only a part \(0.5\)",
    ),
    (LlamaConfig(num_hidden_layers=513), "has 513 layers, and 512 are the most"),
    (LlamaConfig(quantization_config={"quant_method": "gptq"}), "weights are quantised"),
    (
        AutoConfig.for_model("bert", hidden_act="silu"),
        "language tower is bert, which has a graph of its own",
    ),
    (LlavaConfig(text_config=MistralConfig(sliding_window=64)), "sliding window of 64"),
]


@pytest.mark.parametrize("name", [*BUILDERS, *PECULIAR])
def test_families(name, tmp_path):
    model = build(name)
    reasons = refusals(model.config)
    if name not in REFUSED:
        assert reasons == () == refusals(model.config.get_text_config())
        return
    assert any(REFUSED[name] in reason for reason in reasons)


@pytest.mark.parametrize(("config", "match"), CONFIGS, ids=[match for _, match in CONFIGS])
def test_single_values(config, match):
    reasons = refusals(config)
    assert len(reasons) == 1
    with pytest.raises(UnsupportedModelError, match=match):
        raise UnsupportedModelError(reasons[0])


def test_a_window_that_no_text_reaches_is_none():
    assert refusals(MistralConfig(sliding_window=4096, max_position_embeddings=4096)) == ()
    assert refusals(Qwen2Config(sliding_window=4096, use_sliding_window=False)) == ()


def test_uneven_layers_and_several_reasons():
    from plans import random_plan

    model = build("llama")
    pruned = prune(model, random_plan(model))
    assert pruned.config.is_heterogeneous and refusals(pruned.config) == ()
    config = MistralConfig(sliding_window=4096, hidden_act="relu", num_hidden_layers=600)
    assert len(refusals(config)) == 3


def test_export_refuses_by_the_same_reasons_and_writes_nothing(tmp_path):
    folder = save(build("qwen3"), tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=f"cannot run .*{REFUSED['qwen3']}"):
        export_gguf(folder, tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
