"""The plug-in for vLLM, without vLLM: what is registered, what it imports, and what it refuses.

tests/vllm_runtime runs it in vLLM (`make test-vllm`).
"""

import ast
import copy
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
from models import build
from plans import dropping_plan, random_plan
from transformers import AutoConfig

from hipp_ext import pad_to_uniform, prune, save_pruned
from hipp_ext.errors import CheckpointError, MissingExtraError
from hipp_ext.integrations import vllm as plugin
from hipp_ext.integrations import vllm_config
from hipp_ext.model_folder import MANIFEST

PLACE = Path(plugin.__file__).parent
SERVED = ("llama", "mistral", "qwen2", "qwen3", "llava", "llava_next", "qwen2_5_vl", "smolvlm")


@pytest.fixture(scope="module")
def configs():
    """Name -> the configuration of a pruned model that has a layer without attention."""
    found = {}
    for name in (*SERVED, "gemma3", "granite_llava"):
        model = build(name)
        plan = dropping_plan(model, "language.1.attention", half=("language.0.attention",))
        found[name] = prune(model, plan).config
        found[name].architectures = [type(model).__name__]  # as in every saved folder
    return found


def test_vllm_finds_the_plug_in():
    found = entry_points(group="vllm.general_plugins", name="hipp")
    assert {entry.load() for entry in found} == {plugin.register}


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_extra_is_named():
    with pytest.raises(MissingExtraError, match=r'pip install "hipp-ext\[vllm\]"'):
        plugin.register()


def test_importing_the_plug_in_costs_nothing():
    code = (
        "import sys; from hipp_ext.integrations import vllm; print(sorted(m for m in sys.modules "
        "if m.split('.')[0] in ('torch', 'transformers', 'numpy', 'vllm', 'hipp_ext')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(out.stdout) == [
        "hipp_ext",
        "hipp_ext.integrations",
        "hipp_ext.integrations.vllm",
        "hipp_ext.integrations.vllm_config",
    ]


def test_every_registered_name_is_a_class_of_its_module():
    for place in plugin.CLASSES.values():
        module, name = place.split(":")
        tree = ast.parse((PLACE / f"{module.rpartition('.')[2]}.py").read_text())
        assert name in [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    assert set(plugin.CLASSES) <= set(vllm_config.SERVED)
    assert plugin.MANIFEST == MANIFEST


def test_a_layers_configuration_has_its_own_widths_and_the_dense_head_dim(configs):
    for name in (*SERVED, "gemma3"):
        text = configs[name].get_text_config()
        own = [vllm_config.layer_config(text, i) for i in range(text.num_hidden_layers)]
        assert [c.skip for c in own][:2] == [[], ["attention"]], name
        dense = build(name).config.get_text_config()
        heads = dense.num_attention_heads, dense.num_key_value_heads
        assert own[0].num_key_value_heads == max(1, heads[1] // 2)
        assert own[0].num_attention_heads * heads[1] == own[0].num_key_value_heads * heads[0]
        head_dim = getattr(dense, "head_dim", None) or dense.hidden_size // heads[0]
        assert {c.head_dim for c in own} == {head_dim} == {vllm_config.head_dim(text)}
        assert {c.hidden_size for c in own} == {dense.hidden_size}


def test_only_pruned_models_need_layers_of_their_own(configs):
    for name in SERVED:
        assert vllm_config.needs_own_layers(configs[name].get_text_config())
    for name in ("llama", "qwen3", "mistral", "llava"):
        assert not vllm_config.needs_own_layers(build(name).config.get_text_config())
    # Fewer heads in all layers alike: vLLM's Qwen2 would derive another head_dim from them.
    qwen2 = build("qwen2").config
    assert not vllm_config.needs_own_layers(qwen2)
    qwen2.num_attention_heads = qwen2.num_key_value_heads = 2
    assert vllm_config.needs_own_layers(qwen2)
    assert vllm_config.layer_config(qwen2, 0).head_dim == 10


def test_what_ranks_do_not_divide_is_named_by_layer(configs):
    text = configs["llama"].get_text_config()  # 6 heads in 3 KV groups, 44 channels; half: 2 and 1
    assert vllm_config.undivided(text, 1) == []
    assert vllm_config.undivided(text, 2) == ["layer 2 has 6 query heads and 3 KV heads"]
    assert vllm_config.undivided(text, 3) == [
        "layer 0 has 2 query heads and 1 KV heads, 44 FFN channels",
        "layer 1 has 44 FFN channels",
        "layer 2 has 44 FFN channels",
    ]


def test_models_with_a_class_for_their_layers_are_served(configs):
    for name in SERVED:
        assert plugin.refusals(configs[name]) == (), name
        assert plugin.refusals(build(name).config) == ()


def test_other_models_are_refused_by_name(configs):
    (line,) = plugin.refusals(configs["granite_llava"])
    assert "LlavaForConditionalGeneration with a language tower of type 'granite'" in line
    assert "pad_to_uniform" in line
    assert plugin.refusals(build("granite_llava").config) == ()


def test_another_activation_is_refused(configs):
    config = copy.deepcopy(configs["llama"])
    config.hidden_act = "gelu"
    assert plugin.refusals(config) == (
        "The FFN activation is 'gelu'; vLLM's llama knows 'silu' only.",
    )


def test_a_pruned_vision_tower_is_refused_and_a_padded_one_served(tmp_path):
    model = build("llava")
    small = prune(model, random_plan(model, 0.4, towers=("language", "vision")))
    with pytest.warns(UserWarning, match="no processor"):
        save_pruned(small, tmp_path / "small")
        save_pruned(pad_to_uniform(small), tmp_path / "padded")
    (line,) = plugin.refusals(AutoConfig.from_pretrained(tmp_path / "small"))
    assert line.startswith("The vision tower was pruned (vision.0.")
    assert plugin.refusals(AutoConfig.from_pretrained(tmp_path / "padded")) == ()
    (tmp_path / "small" / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        plugin.refusals(small.config, tmp_path / "small")
