"""Model folders as GGUF files, run by llama.cpp itself."""

import copy
import functools
import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import hipp
from gguf import GGMLQuantizationType, GGUFReader
from llama_cpp_runtime import largest_difference, prompts, save, tiny_tokenizer
from models import _text, build
from plans import dropping_plan, random_plan, random_scores
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hipp_ext import load_pruned, prune, save_pruned
from hipp_ext.errors import (
    CheckpointError,
    DataError,
    HippError,
    MissingExtraError,
    OutputExistsError,
    UnsupportedModelError,
    WriteError,
)
from hipp_ext.groups import find_groups
from hipp_ext.integrations.llama_cpp import export_gguf
from hipp_ext.plan import PruningPlan
from hipp_ext.testbed import WEIGHTS
from hipp_ext.units import plan_from_counts


def whole(model: nn.Module) -> PruningPlan | None:
    return None


def uniform(model: nn.Module) -> PruningPlan:
    """Half of the units of every group, so that all layers stay alike."""
    groups = find_groups(model)
    generator = torch.Generator().manual_seed(0)
    scores = {g.name: torch.randn(g.width, generator=generator) for g in groups}
    return plan_from_counts(groups, [max(1, g.width // 2) for g in groups], scores)


def without(*names: str) -> Callable[[nn.Module], PruningPlan]:
    return functools.partial(_dropping, names=names)


def _dropping(model: nn.Module, names: tuple[str, ...]) -> PruningPlan:
    return dropping_plan(model, *names, half=("language.1.ffn",))


def query_heads(model: nn.Module) -> PruningPlan:
    """Fewer query heads in some layers, all keys and values."""
    groups = find_groups(model, attention_unit="query")
    counts = [g.width - (g.layer > 0) * g.sections for g in groups]
    return plan_from_counts(groups, counts, random_scores(groups))


LAYER = without("language.1.attention", "language.1.ffn")
BLOCKS = without("language.1.attention", "language.2.ffn")
FIRST = without("language.0.attention", "language.2.attention", "language.2.ffn")
CASES = [
    ("llama", whole, "llama"),
    ("llama", random_plan, "deci"),
    ("llama", uniform, "llama"),
    ("llama", LAYER, "llama"),
    ("llama", BLOCKS, "deci"),
    ("llama", query_heads, "deci"),
    ("llama", FIRST, "deci"),
    ("mistral", random_plan, "deci"),
    ("mistral", whole, "llama"),
    ("qwen2", whole, "qwen2"),
    ("qwen2", random_plan, "deci"),
    ("qwen2", uniform, "deci"),
    ("qwen2", BLOCKS, "deci"),
    ("llava_gqa", random_plan, "deci"),
    ("llava", whole, "llama"),
    ("smolvlm", BLOCKS, "deci"),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A pruned Llama with its tokenizer."""
    model = build("llama")
    return save(prune(model, random_plan(model)), tmp_path_factory.mktemp("gguf") / "llama")


@pytest.fixture(scope="module")
def source(llama) -> Path:
    """A GGUF file that has a tokenizer."""
    return export_gguf(llama, llama.with_name("source.gguf")).path


@pytest.mark.parametrize(
    ("name", "make", "architecture"),
    CASES,
    ids=[f"{n}-{getattr(m, '__name__', 'dropped')}-{i}" for i, (n, m, _) in enumerate(CASES)],
)
def test_llama_cpp_answers_as_transformers_does(tmp_path, source, name, make, architecture):
    model = build(name)
    plan = make(model)
    folder = save_pruned(model if plan is None else prune(model, plan), tmp_path / "model")
    done = export_gguf(folder, tmp_path / "model.gguf", type="f32", tokenizer_from=source)
    assert done.architecture == architecture
    assert largest_difference(load_pruned(folder), done.path, prompts()) < 1e-4


@pytest.mark.parametrize(
    "rope",
    [
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
        {"rope_type": "linear", "factor": 4.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_positions_biases_and_tied_embeddings(tmp_path, rope):
    config = _text(
        LlamaConfig,
        rope_parameters=rope | {"rope_theta": 10000.0},
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    folder = save(prune(model, random_plan(model)), tmp_path / "model")
    done = export_gguf(folder, tmp_path / "model.gguf", type="f32")
    names = {tensor.name for tensor in GGUFReader(done.path).tensors}
    assert "output.weight" not in names and "blk.0.ffn_gate.bias" in names
    assert largest_difference(load_pruned(folder), done.path, prompts(8)) < 1e-4
    # The file may also hold the one that is tied to the other, or both.
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors.pop("model.embed_tokens.weight")
    for own in ({}, {"model.embed_tokens.weight": embedding}):
        own |= {"lm_head.weight": embedding.clone() if own else embedding * 1.5}
        save_file(tensors | own, folder / "model.safetensors", metadata={"format": "pt"})
        export_gguf(folder, done.path, type="f32", overwrite=True)
        assert largest_difference(load_pruned(folder), done.path, prompts(4)) < 1e-4


# Rounding of tiny models with large weights, over one to two dozen layers' worth of products.
@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 0.02), ("bf16", 0.15), ("q8_0", 0.2)])
def test_the_types_of_weights(tmp_path, kind, tolerance):
    torch.manual_seed(1)
    model = LlamaForCausalLM(_text(LlamaConfig, hidden=64, heads=4, head_dim=16, ffn=96)).eval()
    groups = find_groups(model)
    counts = [g.width - (g.name == "language.1.ffn") for g in groups]
    scores = {g.name: torch.arange(g.width, dtype=torch.float) for g in groups}
    folder = save(prune(model, plan_from_counts(groups, counts, scores)), tmp_path / "model")
    done = export_gguf(folder, tmp_path / "model.gguf", type=kind)
    types = {tensor.name: tensor.tensor_type for tensor in GGUFReader(done.path).tensors}
    plain = GGMLQuantizationType[kind.upper()]
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == plain
    assert types["blk.0.attn_norm.weight"] == GGMLQuantizationType.F32
    odd = types["blk.1.ffn_down.weight"]  # rows of 95
    assert odd == (GGMLQuantizationType.F16 if kind == "q8_0" else plain)
    assert any("1 matrices" in note and "--round-to 32" in note for note in done.notes) == (
        kind == "q8_0"
    )
    worst = largest_difference(load_pruned(folder), done.path, prompts(6), same=False)
    assert worst < tolerance


def test_a_llava_says_what_becomes_of_its_vision_tower(tmp_path):
    model = build("llava")
    folder = save(prune(model, random_plan(model)), tmp_path / "language")
    told = hipp("export", "gguf", folder, "-o", tmp_path / "language.gguf")
    assert "mmproj of the unpruned model goes on working" in " ".join(told.split())
    both = prune(model, random_plan(model, towers=("language", "vision")))
    done = export_gguf(save(both, tmp_path / "both"), tmp_path / "both.gguf")
    assert any("vision tower was pruned too" in note for note in done.notes)


def test_the_command_names_file_size_and_architecture(tmp_path, llama):
    told = hipp("export", "gguf", llama, "-o", tmp_path / "a.gguf", "--type", "bf16")
    size = (tmp_path / "a.gguf").stat().st_size
    assert f"{size / 1e6:.1f} MB, architecture deci, bf16" in told
    assert "hipp export gguf ./pruned" in hipp("export", "gguf", "--help")


def test_an_existing_file_stays_unless_overwriting_is_asked_for(tmp_path, llama):
    output = tmp_path / "a.gguf"
    output.write_text("mine")
    with pytest.raises(OutputExistsError, match="exists"):
        export_gguf(llama, output)
    assert output.read_text() == "mine"
    export_gguf(llama, output, overwrite=True)
    assert GGUFReader(output).get_field("general.architecture").contents() == "deci"
    with pytest.raises(OutputExistsError, match="two names"):
        export_gguf(llama, output, mmproj=output, overwrite=True)


def test_a_missing_gguf_names_the_extra(tmp_path, llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r'pip install "hipp-ext\[gguf\]"'):
        export_gguf(llama, tmp_path / "a.gguf")


def test_an_unknown_type_is_refused(tmp_path, llama):
    with pytest.raises(HippError, match="q4_0.*f32, f16, bf16, q8_0"):
        export_gguf(llama, tmp_path / "a.gguf", type="q4_0")  # type: ignore[arg-type]


def test_a_full_disk_leaves_nothing(tmp_path, llama):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(WriteError, match="a.gguf could not be written: File too large"):
            export_gguf(llama, tmp_path / "a.gguf", type="f32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_value_too_large_for_f16_leaves_nothing(tmp_path):
    model = build("llama")
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = 7e4
    folder = save(model, tmp_path / "model")
    with pytest.raises(DataError, match=r"blk.2.ffn_down.weight has a value of 7e\+04.*bf16"):
        export_gguf(folder, tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    export_gguf(folder, tmp_path / "a.gguf", type="bf16")


def test_folders_that_are_none_or_incomplete(tmp_path, llama):
    output = tmp_path / "a.gguf"
    with pytest.raises(CheckpointError, match="not a model folder"):
        export_gguf(tmp_path / "nothing", output)
    half = tmp_path / "half"
    shutil.copytree(llama, half)
    weights = (half / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="incomplete or damaged"):
        export_gguf(half, output)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        tensors = load_file(llama / "model.safetensors")
        del tensors[name]
        save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"no weights for.*{name}"):
            export_gguf(half, output)
    assert not output.exists()


def test_weights_that_do_not_fit_each_other(tmp_path, llama):
    odd = tmp_path / "odd"
    shutil.copytree(llama, odd)
    whole_ones = load_file(llama / "model.safetensors")
    tensors = dict(whole_ones)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name][:, 1:].contiguous()
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} has the shape"):
        export_gguf(odd, tmp_path / "a.gguf")
    layer = "model.layers.0.self_attn"
    tensors = whole_ones | {
        f"{layer}.{part}_proj.weight": whole_ones[f"{layer}.{part}_proj.weight"][1:].contiguous()
        for part in "kv"
    }
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="rows of queries and .* of keys"):
        export_gguf(odd, tmp_path / "a.gguf")


def test_a_model_without_a_head_is_refused(tmp_path):
    model = build("llama").model
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="LlamaModel, which predicts no tokens"):
        export_gguf(tmp_path / "model", tmp_path / "a.gguf")


def test_a_folder_without_a_tokenizer_says_where_to_take_one_from(tmp_path, source):
    bare = tmp_path / "bare"
    model = build("llama")
    with pytest.warns(UserWarning, match="no processor"):
        save_pruned(model, bare)
    with pytest.raises(CheckpointError, match="no tokenizer .*--tokenizer-from FILE"):
        export_gguf(bare, tmp_path / "a.gguf")
    done = export_gguf(bare, tmp_path / "b.gguf", type="f32", tokenizer_from=source)
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.scores"):
        fields = [GGUFReader(path).get_field(key).contents() for path in (source, done.path)]
        assert fields[0] == fields[1]
    assert largest_difference(model, done.path, prompts(3)) < 1e-4


def test_a_tokenizer_that_is_not_the_folder_s_is_told(tmp_path, llama):
    same = export_gguf(llama, tmp_path / "same.gguf").path
    assert export_gguf(llama, tmp_path / "a.gguf", tokenizer_from=same).notes == ()
    other = save_pruned(build("llama"), tmp_path / "model", tiny_tokenizer(40))
    source = export_gguf(other, tmp_path / "other.gguf").path
    (note,) = export_gguf(llama, tmp_path / "b.gguf", tokenizer_from=source).notes
    assert "other.gguf has another tokenizer than the folder" in note


def test_files_that_no_tokenizer_can_be_taken_from(tmp_path, llama):
    with pytest.raises(DataError, match="cannot be read"):
        export_gguf(llama, tmp_path / "a.gguf", tokenizer_from=tmp_path / "nothing.gguf")
    whole = export_gguf(llama, tmp_path / "whole.gguf").path.read_bytes()
    wrong = {
        b"GGUF" + bytes(range(200)): "does not begin with GGUF",
        whole[:700]: "bytes are needed where",
        whole[:24] + b"\xff" * 8 + whole[32:]: "bytes are needed where",
        whole.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz"): "of 0 tokens",
    }
    for content, match in wrong.items():
        (tmp_path / "wrong.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=match):
            export_gguf(llama, tmp_path / "a.gguf", tokenizer_from=tmp_path / "wrong.gguf")
    larger = LlamaForCausalLM(copy.deepcopy(build("llama").config))
    larger.resize_token_embeddings(120)
    source = export_gguf(save(larger, tmp_path / "larger"), tmp_path / "larger.gguf").path
    with pytest.raises(CheckpointError, match="tokenizer of 120 tokens, and the model 97 rows"):
        export_gguf(llama, tmp_path / "a.gguf", tokenizer_from=source)


def test_ends_of_a_text_come_from_the_generation_settings(tmp_path, llama):
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 2]}))
    reader = GGUFReader(export_gguf(folder, tmp_path / "a.gguf").path)
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == 4
    assert reader.get_field("tokenizer.ggml.eot_token_id").contents() == 2


def test_a_tokenizer_that_llama_cpp_does_not_know_leaves_no_file(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(WEIGHTS, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UnsupportedModelError, match="WordLevel.*--tokenizer-from FILE"):
        export_gguf(folder, tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_more_tokens_than_rows_is_another_model(tmp_path):
    folder = save_pruned(build("llama"), tmp_path / "model", tiny_tokenizer())
    larger = json.loads((folder / "tokenizer.json").read_text())
    larger["added_tokens"].append(larger["added_tokens"][-1] | {"id": 97, "content": "<new>"})
    larger["model"]["vocab"] += [[f"t{i}", -9.0] for i in range(97 - len(larger["model"]["vocab"]))]
    (folder / "tokenizer.json").write_text(json.dumps(larger))
    with pytest.raises(CheckpointError, match="a token 97, and the model 97 rows"):
        export_gguf(folder, tmp_path / "a.gguf")
