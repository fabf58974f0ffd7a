"""What is built of a folder in vLLM, and what is refused when it is loaded."""

import json

import pytest
from plans import dropping_plan, random_plan
from served import by_transformers, by_vllm, engine, largest_difference
from shapes import SHAPES
from tiny import TEXT, noisy, sizes, texts
from tiny_llava import llava
from transformers import LlamaConfig, LlamaForCausalLM

from hipp_ext import prune, save_pruned
from hipp_ext.errors import CheckpointError, UnsupportedModelError

STOCK = "vllm.model_executor.models"
OURS = "hipp_ext.integrations.vllm_layers"


def homes(model) -> set[str]:
    """Modules that the classes of a language model's layers come from."""
    return {type(layer).__module__ for layer in model.model.layers}


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_only_a_model_with_different_layers_gets_layers_of_ours(name, tmp_path):
    model = noisy(TEXT[name]())
    save_pruned(model, tmp_path / "dense")
    save_pruned(prune(model, SHAPES["blocks"](model)), tmp_path / "pruned")
    with engine(tmp_path / "dense", skip_tokenizer_init=True) as llm:
        assert llm.apply_model(homes) == [{f"{STOCK}.{name}"}]
    with engine(tmp_path / "pruned", skip_tokenizer_init=True) as llm:
        assert llm.apply_model(homes) == [{OURS}]


def test_layers_without_attention_have_no_cache(tmp_path):
    model = noisy(TEXT["llama"]())
    save_pruned(prune(model, SHAPES["blocks"](model)), tmp_path / "pruned")
    with engine(tmp_path / "pruned", skip_tokenizer_init=True) as llm:
        context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    assert sorted(context) == [f"model.layers.{i}.self_attn.attn" for i in (1, 3)]


def test_two_ranks_share_what_they_divide(tmp_path):
    config = LlamaConfig(**sizes(num_attention_heads=8, num_key_value_heads=4))
    model, prompts = noisy(LlamaForCausalLM(config)), texts()
    half = ("language.0.attention", "language.1.ffn")
    small = prune(model, dropping_plan(model, "language.2.attention", half=half))
    save_pruned(small, tmp_path / "pruned")
    ranks = dict(tensor_parallel_size=2, distributed_executor_backend="mp")
    ours = by_vllm(tmp_path / "pruned", prompts, **ranks)
    assert largest_difference(ours, by_transformers(small, prompts)) < 1e-3


def test_a_pruned_vision_tower_is_refused(tmp_path):
    model, processor, _ = llava()
    plan = random_plan(model, 0.4, towers=("language", "vision"))
    save_pruned(prune(model, plan), tmp_path / "pruned", processor)
    with (
        pytest.raises(UnsupportedModelError, match="The vision tower was pruned"),
        engine(tmp_path / "pruned"),
    ):
        pass


def test_a_damaged_folder_is_refused(tmp_path):
    model, processor, _ = llava()
    folder = save_pruned(prune(model, SHAPES["free"](model)), tmp_path / "pruned", processor)
    manifest = json.loads((folder / "hipp_ext.json").read_text())
    (folder / "hipp_ext.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(CheckpointError, match="of another format"), engine(folder):
        pass
