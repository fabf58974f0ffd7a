"""HippStructuredPruningModifier in real llm-compressor runs: real modifiers, real pipelines, tiny
real models.
"""

import copy
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from models import BUILDERS, IMAGE_TOKEN, batch, build
from plans import dropping_plan, logits, query_plan, random_plan
from torch.utils.data import DataLoader
from vlm_tables import save_llava
from zoo import FAMILIES

from hipp_ext import PruningPlan, load_pruned, masked, pad_to_uniform, prune, save_pruned
from hipp_ext.budget import Bounds, keep_counts
from hipp_ext.errors import (
    BudgetError,
    CalibrationError,
    PlanError,
    RecipeError,
    UnsupportedModelError,
)
from hipp_ext.groups import find_groups
from hipp_ext.integrations.llm_compressor import (
    HippStructuredPruningModifier,
    sparsity_per_layer,
    validate_calibration,
)
from hipp_ext.preference import Preference
from hipp_ext.scorers import Magnitude
from hipp_ext.surgery.masks import removed_entries, zero_units
from hipp_ext.units import plan_from_counts

# The integration comes first: it keeps llm-compressor's import in bounds.
from llmcompressor import oneshot  # isort: skip
from llmcompressor.modifiers import Modifier  # isort: skip
from llmcompressor.modifiers.gptq import GPTQModifier  # isort: skip
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier  # isort: skip
from llmcompressor.modifiers.quantization import QuantizationModifier  # isort: skip
from llmcompressor.modifiers.transform import QuIPModifier, SpinQuantModifier  # isort: skip

NAMES = ("llava_gqa", "qwen2_5_vl", "smolvlm", "llama", "qwen3")
IGNORE = ["re:.*lm_head", "re:.*vision.*", "re:.*visual.*", "re:.*projector.*", "re:.*connector.*"]
# Columns in a quantisation group: divides the tiny models' hidden sizes, but not every FFN width.
GROUP = 4


class NoProcessor:
    """oneshot wants a processor with every data set, also with one that needs none."""

    def save_pretrained(self, *args, **kwargs):
        pass


def grouped(size: int = GROUP, **weights) -> dict:
    """Arguments of a quantisation modifier: 4-bit weights in groups of `size` columns."""
    args = dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=size) | weights
    return dict(config_groups={"group_0": dict(targets=["Linear"], weights=args)}, ignore=IGNORE)


QUANTISERS = {
    "W8A8": lambda: QuantizationModifier(scheme="W8A8", targets=["Linear"], ignore=IGNORE),
    "W4A16": lambda: QuantizationModifier(**grouped()),
    "GPTQ": lambda: GPTQModifier(**grouped()),
    "GPTQ asymmetric": lambda: GPTQModifier(**grouped(symmetric=False)),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Name -> the model, loaded from disk as llm-compressor demands."""
    folder = tmp_path_factory.mktemp("dense")

    def load(name: str):
        if not (folder / name).exists():
            build(name).save_pretrained(folder / name)
        return type(BUILDERS[name]()).from_pretrained(folder / name).eval()

    return load


def data(name: str, samples: int = 3) -> dict:
    loader = DataLoader([batch(name, 1, seed=i) for i in range(samples)], batch_size=None)
    return {"dataset": loader, "processor": NoProcessor()}


def plan_for(model, round_to: int = 1, ratio: float = 0.4) -> PruningPlan:
    generator = torch.Generator().manual_seed(0)
    groups = find_groups(model)
    scores = {g.name: torch.randn(g.width, generator=generator) for g in groups}
    allocation = torch.randn(len(groups), generator=generator).tolist()
    return plan_from_counts(
        groups, keep_counts(groups, allocation, ratio, Bounds(round_to=round_to)), scores
    )


def expected_logits(model, plan: PruningPlan, mode: str, inputs: dict) -> torch.Tensor:
    if mode == "shrink":
        return logits(prune(model, plan), inputs)
    with masked(model, plan):
        return logits(model, inputs)


def widths_in(config) -> dict:
    return config.get_text_config().to_dict().get("per_layer_config") or {}


def filled(model, entries) -> int:
    return sum(
        int(model.get_parameter(name).data[index].count_nonzero())
        for name, index in entries.items()
    )


# Prune, save, load


@pytest.mark.parametrize("mode", ["shrink", "mask"])
def test_blocks_that_go_whole_come_back_to_the_bit(dense, tmp_path, mode):
    model, inputs = dense("llava"), batch("llava", labels=True)
    names = ("language.0.attention", "language.1.attention", "language.1.ffn")
    plan = dropping_plan(model, *names, half=("language.2.ffn",))
    expected = expected_logits(model, plan, mode, inputs)
    recipe = [HippStructuredPruningModifier(plan=plan, mode=mode), QUANTISERS["W8A8"]()]
    oneshot(model=model, recipe=recipe[:1], pipeline="basic", **data("llava"))
    assert torch.allclose(logits(model, inputs), expected, atol=1e-4)
    oneshot(model=model, recipe=recipe[1:], output_dir=str(tmp_path / "out"), **data("llava"))
    loaded = load_pruned(tmp_path / "out")
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert loaded.hipp_plan == plan


@pytest.mark.parametrize("mode", ["shrink", "mask"])
@pytest.mark.parametrize("name", ["llava_gqa", "qwen2_5_vl", "llama"])
def test_query_heads_are_pruned_quantised_and_come_back_to_the_bit(dense, tmp_path, name, mode):
    model, inputs = dense(name), batch(name, labels=True)
    plan = query_plan(model)
    expected = expected_logits(model, plan, mode, inputs)
    recipe = [HippStructuredPruningModifier(plan=plan, mode=mode), QUANTISERS["W8A8"]()]
    oneshot(model=model, recipe=recipe[:1], pipeline="basic", **data(name))
    assert torch.allclose(logits(model, inputs), expected, atol=1e-4)
    oneshot(model=model, recipe=recipe[1:], output_dir=str(tmp_path / "out"), **data(name))
    loaded = load_pruned(tmp_path / "out")
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert loaded.hipp_plan == plan


def test_packed_weights_of_query_heads_come_back_to_the_bit(dense, tmp_path):
    """The shapes of packed weights tell no widths."""
    model, inputs = dense("llava_gqa"), batch("llava_gqa", labels=True)
    groups = find_groups(model, attention_unit="query")
    counts = [g.width if g.place == "ffn" else 4 for g in groups]
    counts[2] = 2
    plan = plan_from_counts(groups, counts, Magnitude()(model, groups=groups))
    recipe = [HippStructuredPruningModifier(plan=plan), QUANTISERS["GPTQ"]()]
    oneshot(model=model, recipe=recipe, output_dir=str(tmp_path / "out"), **data("llava_gqa"))
    loaded = load_pruned(tmp_path / "out")
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert loaded.model.language_model.layers[1].self_attn.num_key_value_groups == 1


def test_masked_query_heads_beside_what_would_fill_them_are_refused(dense):
    for other in (QUANTISERS["GPTQ"](), SparseGPTModifier(sparsity=0.5, targets=["Linear"])):
        model = dense("llava_gqa")
        before = copy.deepcopy(model.state_dict())
        recipe = [HippStructuredPruningModifier(plan=query_plan(model), mode="mask"), other]
        with pytest.raises(RecipeError, match='mode="mask" and query heads, and .* in one recipe'):
            oneshot(model=model, recipe=recipe, **data("llava_gqa"))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_preference_can_ask_for_query_heads(dense):
    model = dense("llava_gqa")
    modifier = HippStructuredPruningModifier(
        preference=Preference(1, 1, 1), pruning_ratio=0.3, attention_unit="query"
    )
    oneshot(model=model, recipe=[modifier], pipeline="basic", **data("llava_gqa"))
    assert model.hipp_plan.attention_unit == "query" and model.hipp_plan.pruning_ratio >= 0.3
    with pytest.raises(ValueError, match="attention_unit, partial go with a preference"):
        HippStructuredPruningModifier(plan="plan.json", attention_unit="query")


def from_disk(family, folder):
    """The model of a family of the zoo, loaded as llm-compressor demands; and its calibration."""
    family.build().save_pretrained(folder)
    loader = DataLoader([family.batch(1, seed=i) for i in range(3)], batch_size=None)
    model = family.cls.from_pretrained(folder).eval()
    return model, {"dataset": loader, "processor": NoProcessor(), "pipeline": "basic"}


@pytest.mark.parametrize("mode", ["shrink", "mask"])
def test_weights_of_inputs_by_outputs_are_pruned_like_others(tmp_path, mode):
    model, samples = from_disk(FAMILIES["gpt2"], tmp_path)
    plan, inputs = plan_for(model), FAMILIES["gpt2"].batch()
    expected = expected_logits(model, plan, mode, inputs)
    oneshot(model=model, recipe=[HippStructuredPruningModifier(plan=plan, mode=mode)], **samples)
    assert torch.allclose(logits(model, inputs), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["shrink", "mask"])
@pytest.mark.parametrize(
    ("name", "implementation"),
    [*((name, "sdpa") for name in NAMES), ("llava_gqa", "eager"), ("qwen2_5_vl", "eager")],
)
def test_the_model_is_the_pruned_one_and_comes_back_to_the_bit(
    dense, tmp_path, name, implementation, mode
):
    model, inputs = dense(name), batch(name, labels=True)
    model.set_attn_implementation(implementation)
    plan, shapes = random_plan(model), {n: p.shape for n, p in model.named_parameters()}
    small, expected = prune(model, plan), expected_logits(model, plan, mode, inputs)
    with masked(model, plan):
        generated = model.generate(**batch(name), max_new_tokens=5, do_sample=False)
    entries = removed_entries(model, plan)
    oneshot(
        model=model,
        recipe=[HippStructuredPruningModifier(plan=plan, mode=mode)],
        pipeline="sequential",
        **data(name),
    )
    assert torch.equal(logits(model, inputs), expected)
    if mode == "shrink":
        assert {g.name: g.width for g in find_groups(model)} == plan.keep_counts
        assert widths_in(small.config)
    else:
        assert (
            {n: p.shape for n, p in model.named_parameters()} == shapes
            and entries
            and not filled(model, entries)
        )
    model.save_pretrained(tmp_path / "a")
    loaded = load_pruned(tmp_path / "a", attn_implementation=implementation)
    assert torch.equal(logits(loaded, inputs), expected) and loaded.hipp_plan == plan
    assert widths_in(loaded.config) == (widths_in(small.config) if mode == "shrink" else {})
    for option in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        arguments = dict(**batch(name), max_new_tokens=5, do_sample=False, **option)
        assert torch.equal(loaded.generate(**arguments), small.generate(**arguments)), option
    assert torch.equal(loaded.generate(**batch(name), max_new_tokens=5, do_sample=False), generated)
    loaded.train()(**inputs).loss.backward()
    assert all(
        loaded.get_submodule(g.consumer).weight.grad.abs().sum() > 0 for g in find_groups(loaded)
    )


@pytest.mark.parametrize("mode", ["shrink", "mask"])
@pytest.mark.parametrize("pipeline", ["independent", "basic", "datafree"])
def test_every_pipeline_gives_the_same_model(dense, tmp_path, pipeline, mode):
    model, inputs = dense("llava_gqa"), batch("llava_gqa")
    plan = random_plan(model)
    plan.save(tmp_path / "plan.json")
    expected = expected_logits(model, plan, mode, inputs)
    samples = {} if pipeline == "datafree" else data("llava_gqa")
    recipe = HippStructuredPruningModifier(plan=tmp_path / "plan.json", mode=mode)
    oneshot(model=model, recipe=recipe, pipeline=pipeline, **samples)
    assert torch.equal(logits(model, inputs), expected)


def test_models_that_llm_compressor_offloads_are_pruned_too(dense):
    from compressed_tensors.offload import set_onload_device

    for mode in ("shrink", "mask"):
        model, inputs = dense("llava"), batch("llava")
        plan = random_plan(model)
        expected = logits(prune(model, plan), inputs)
        set_onload_device(
            model, "meta"
        )  # in an accelerator's place: weights that are read by name come without values
        assert model.lm_head.weight.is_meta
        oneshot(model=model, recipe=[HippStructuredPruningModifier(plan=plan, mode=mode)])
        assert torch.allclose(logits(model, inputs), expected, atol=1e-5)


def test_output_dir_save_pruned_and_padding_write_what_they_should(dense, tmp_path):
    model, inputs = dense("llava_gqa"), batch("llava_gqa")
    plan = random_plan(model)
    oneshot(
        model=model,
        recipe=[HippStructuredPruningModifier(plan=plan)],
        output_dir=str(tmp_path / "a"),
    )
    save_pruned(model, tmp_path / "b")
    pad_to_uniform(model).save_pretrained(tmp_path / "c")
    smaller = prune(model, random_plan(model, 0.2, seed=1))
    smaller.save_pretrained(tmp_path / "d")  # the copy, not the model it was made from
    expected = logits(model, inputs)
    assert torch.equal(logits(load_pruned(tmp_path / "a"), inputs), expected)
    assert torch.equal(logits(load_pruned(tmp_path / "b"), inputs), expected)
    stock = type(model).from_pretrained(tmp_path / "c").eval()
    assert torch.allclose(logits(stock, inputs), expected, atol=1e-5)
    from safetensors.torch import load_file

    name = "model.layers.0.mlp.up_proj.weight"
    saved = next(
        v
        for k, v in load_file(tmp_path / "d/model.safetensors").items()
        if k.endswith(name.partition(".")[2])
    )
    assert saved.shape[0] == find_groups(smaller)[1].width < find_groups(model)[1].width


# Prune and quantise in one recipe


@pytest.mark.parametrize("mode", ["shrink", "mask"])
@pytest.mark.parametrize(
    ("name", "quantiser", "pipeline", "compressed"),
    [
        *((name, "GPTQ", "sequential", True) for name in ("qwen2_5_vl", "qwen3")),
        *(("llava_gqa", quantiser, "independent", True) for quantiser in QUANTISERS),
        *(("llava_gqa", quantiser, "independent", False) for quantiser in ("W8A8", "GPTQ")),
    ],
)
def test_pruned_and_quantised_in_one_recipe(
    dense, tmp_path, name, mode, quantiser, pipeline, compressed
):
    model, inputs = dense(name), batch(name)
    plan = plan_for(model, GROUP)
    entries, size = removed_entries(model, plan), model.num_parameters()
    with masked(model, plan):
        unquantised = logits(model, inputs)
    recipe = [HippStructuredPruningModifier(plan=plan, mode=mode), QUANTISERS[quantiser]()]
    oneshot(model=model, recipe=recipe, pipeline=pipeline, **data(name))
    expected = logits(model, inputs)
    error = float((expected - unquantised).norm() / unquantised.norm())
    assert 0 < error < (0.1 if quantiser == "W8A8" else 0.9), (
        "quantised, and still the pruned model"
    )
    model.save_pretrained(tmp_path / "a", save_compressed=compressed)
    loaded = load_pruned(tmp_path / "a")
    assert torch.equal(logits(loaded, inputs), expected)
    assert torch.equal(logits(model, inputs), expected), (
        "the model in memory was changed by saving it"
    )
    if mode == "mask":
        assert entries and not filled(model, entries) and not filled(loaded, entries)
    else:
        assert {g.name: g.width for g in find_groups(loaded)} == plan.keep_counts
        assert (
            sum(p.numel() for n, p in loaded.named_parameters() if n.endswith(("weight", "bias")))
            < size
        )
    arguments = dict(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(loaded.generate(**arguments), model.generate(**arguments))


def test_one_call_after_the_other_and_from_folder_to_folder(dense, tmp_path):
    model, inputs = dense("llava_gqa"), batch("llava_gqa")
    plan = plan_for(model, GROUP)
    small = prune(model, plan)
    oneshot(model=model, recipe=[HippStructuredPruningModifier(plan=plan)])
    oneshot(model=model, recipe=[QUANTISERS["W4A16"]()])
    model.save_pretrained(tmp_path / "calls")
    save_pruned(small, tmp_path / "small")
    again = load_pruned(tmp_path / "small")
    oneshot(model=again, recipe=[QUANTISERS["W4A16"]()])
    save_pruned(again, tmp_path / "folders")
    expected = logits(model, inputs)
    assert torch.equal(logits(load_pruned(tmp_path / "calls"), inputs), expected)
    assert torch.equal(logits(load_pruned(tmp_path / "folders"), inputs), expected)


def test_a_quantised_and_pruned_vision_tower_comes_back(dense, tmp_path):
    model, inputs = dense("llava"), batch("llava")
    plan = random_plan(model, towers=("language", "vision"))
    with masked(model, plan):
        unquantised = logits(model, inputs)
    quantiser = QuantizationModifier(scheme="W8A8", targets=["Linear"], ignore=["re:.*lm_head"])
    oneshot(model=model, recipe=[HippStructuredPruningModifier(plan=plan), quantiser])
    expected = logits(model, inputs)
    assert (expected - unquantised).norm() < 0.1 * unquantised.norm()
    model.save_pretrained(tmp_path / "a")
    assert torch.equal(logits(load_pruned(tmp_path / "a"), inputs), expected)


def test_without_compressed_tensors_the_folder_is_not_blamed(dense, tmp_path, monkeypatch):
    model = dense("llama")
    recipe = [HippStructuredPruningModifier(plan=random_plan(model)), QUANTISERS["W8A8"]()]
    oneshot(model=model, recipe=recipe, output_dir=str(tmp_path / "a"))
    module = "transformers.quantizers.quantizer_compressed_tensors"
    monkeypatch.setattr(
        f"{module}.is_compressed_tensors_available", lambda: False
    )  # as on a machine without it
    with pytest.raises(ImportError, match="requires compressed-tensors"):
        load_pruned(tmp_path / "a")


def test_bfloat16_and_tied_embeddings_stay_so(tmp_path):
    from transformers import LlamaForCausalLM

    model = build("llama").to(torch.bfloat16)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "dense")
    model, inputs = (
        LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto").eval(),
        batch("llama"),
    )
    recipe = [HippStructuredPruningModifier(plan=plan_for(model, GROUP)), QUANTISERS["GPTQ"]()]
    oneshot(model=model, recipe=recipe, output_dir=str(tmp_path / "a"), **data("llama"))
    loaded = load_pruned(tmp_path / "a")
    assert (
        loaded.dtype == torch.bfloat16 and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    )
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_stock_transformers_loads_a_masked_and_quantised_llava(dense, tmp_path):
    model, inputs = dense("llava"), batch("llava")
    recipe = [
        HippStructuredPruningModifier(plan=random_plan(model), mode="mask"),
        QUANTISERS["W8A8"](),
    ]
    oneshot(model=model, recipe=recipe, output_dir=str(tmp_path / "a"))
    assert torch.equal(
        logits(type(model).from_pretrained(tmp_path / "a").eval(), inputs), logits(model, inputs)
    )


# Recipes


RECIPE = """
prune_stage:
  pruning_modifiers:
    HippStructuredPruningModifier: {plan: PLAN, mode: MODE}
  quantization_modifiers:
    QuantizationModifier:
      scheme: W8A8
      targets: [Linear]
      ignore: ["re:.*lm_head", "re:.*vision.*", "re:.*projector.*"]
"""


@pytest.mark.parametrize("mode", ["shrink", "mask"])
def test_a_yaml_recipe_and_the_recipe_that_was_saved_give_the_same_model(
    dense, tmp_path, monkeypatch, mode
):
    model, inputs = dense("llava"), batch("llava")
    plan = random_plan(model)
    plan.save(tmp_path / "plan.json")
    (tmp_path / "recipe.yaml").write_text(
        RECIPE.replace("PLAN", str(tmp_path / "plan.json")).replace("MODE", mode)
    )
    oneshot(model=model, recipe=str(tmp_path / "recipe.yaml"))
    by_object = dense("llava")
    recipe = [HippStructuredPruningModifier(plan=plan, mode=mode), QUANTISERS["W8A8"]()]
    oneshot(model=by_object, recipe=recipe, output_dir=str(tmp_path / "a"))
    assert torch.equal(logits(by_object, inputs), logits(model, inputs))
    monkeypatch.chdir(tmp_path / "a")  # recipe.yaml names hipp_plan.json, which lies beside it
    replayed = dense("llava")
    oneshot(model=replayed, recipe="recipe.yaml")
    assert torch.equal(logits(replayed, inputs), logits(model, inputs))
    saved = yaml.safe_load(Path("recipe.yaml").read_text())["default_stage"]["default_modifiers"]
    assert saved["HippStructuredPruningModifier"]["plan"] == "hipp_plan.json"


def test_a_preference_is_planned_in_place_with_the_widths_that_the_quantiser_needs(dense):
    model = dense("llava")
    wish = Preference(4, 4, 2)
    recipe = [
        HippStructuredPruningModifier(preference=wish, pruning_ratio=0.3),
        QUANTISERS["W4A16"](),
    ]
    oneshot(model=model, recipe=recipe, **data("llava"))
    plan = model.hipp_plan
    assert 0.3 <= plan.pruning_ratio < 0.35 and plan.preference == pytest.approx(wish.as_tuple())
    assert all(model.get_submodule(g.consumer).in_features % GROUP == 0 for g in find_groups(model))
    by_name = dense("llava")
    numbers = {"utility": 0.4, "robustness": 0.4, "compression": 0.2}
    oneshot(
        model=by_name,
        recipe=[
            HippStructuredPruningModifier(preference=numbers, pruning_ratio=0.3, round_to=GROUP)
        ],
        **data("llava"),
    )
    assert by_name.hipp_plan.groups == plan.groups


PAGE = Path(__file__).parents[2] / "docs" / "llm-compressor.md"


def test_the_page_runs_as_written(tmp_path, monkeypatch):
    blocks = dict(re.findall(r"```(python|yaml)\n(.*?)```", PAGE.read_text(), re.S))
    folder = save_llava(tmp_path / "llava-1.5-7b-hf")
    plan = plan_for(load_pruned(folder), 8)
    plan.save(tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(blocks["python"], str(PAGE), "exec"), names)
    assert {g.name: g.width for g in find_groups(names["small"])} == plan.keep_counts
    assert json.loads(Path("pruned-w8a8/config.json").read_text())["quantization_config"]["ignore"]
    assert Path("pruned-w8a8/processor_config.json").exists()
    by_yaml = load_pruned(folder)
    Path("recipe.yaml").write_text(blocks["yaml"])
    oneshot(model=by_yaml, recipe="recipe.yaml")
    inputs = {"input_ids": torch.tensor([[1, 7, 8, 9]])}
    assert torch.equal(logits(by_yaml, inputs), logits(names["small"], inputs))


# Exporters


@pytest.mark.parametrize("modifier", [WandaPruningModifier, SparseGPTModifier])
@pytest.mark.parametrize(("kind", "targets"), [(None, "LlamaDecoderLayer"), ("ffn", "LlamaMLP")])
def test_unstructured_modifiers_follow_the_plans_allocation(dense, modifier, kind, targets):
    model = dense("llava_gqa")
    plan = random_plan(model)
    sparsity = sparsity_per_layer(plan, kind=kind)
    oneshot(
        model=model, recipe=[modifier(targets=[targets], sparsity=sparsity)], **data("llava_gqa")
    )
    for layer, wanted in zip(model.model.language_model.layers, sparsity, strict=True):
        block = layer if kind is None else layer.mlp
        for name, m in block.named_modules():
            if isinstance(m, torch.nn.Linear):
                share = float((m.weight == 0).float().mean())
                assert share == pytest.approx(wanted, abs=1.01 / min(m.weight.shape)), name
    assert len(set(sparsity)) == 3


def test_sparsities_are_the_plans_exact_ratios():
    model = build("llava")
    plan = random_plan(model)
    total = [sum(g.parameters for g in find_groups(model) if g.layer == i) for i in range(3)]
    assert sum(s * t for s, t in zip(sparsity_per_layer(plan), total, strict=True)) / sum(
        total
    ) == pytest.approx(plan.pruning_ratio)
    attention = [1 - g.keep / g.width for g in plan.groups if g.kind == "attention"]
    assert sparsity_per_layer(plan, kind="attention") == pytest.approx(attention)
    with pytest.raises(PlanError, match="no ffn of the vision tower"):
        sparsity_per_layer(plan, tower="vision", kind="ffn")


# Calibration


def text_only(length: int = 9) -> dict:
    return {
        "input_ids": torch.arange(10, 10 + length)[None],
        "attention_mask": torch.ones(1, length, dtype=torch.long),
    }


def test_good_calibration_is_handed_back():
    model, samples = build("llava"), [batch("llava", 1, seed=i) for i in range(2)]
    assert validate_calibration(model, samples) is samples
    loader = DataLoader(samples, batch_size=None)
    assert validate_calibration(model, loader) is loader
    assert validate_calibration(model, [text_only(), text_only()])
    assert validate_calibration(model, [text_only(), *samples], pipeline="basic")
    assert validate_calibration(build("llama"), [batch("llama", 1)])
    from datasets import Dataset

    rows = {
        "input_ids": [[1, *[IMAGE_TOKEN] * 16, 20 + i] for i in range(2)],
        "pixel_values": [[[[0.5]]], [[[0.25]]]],
    }
    assert validate_calibration(model, Dataset.from_dict(rows))
    with pytest.raises(CalibrationError, match=r"sample 1 lacks \['pixel_values'\]"):
        mixed = {
            "input_ids": [rows["input_ids"][0], [1, 20, 21]],
            "pixel_values": [rows["pixel_values"][0], None],
        }
        validate_calibration(model, Dataset.from_dict(mixed))


BAD_CALIBRATION = {
    "text first": (
        lambda: [text_only(), batch("llava", 1)],
        r"sample 1 has \['pixel_values'\].*dropped without a word",
    ),
    "text later": (
        lambda: [batch("llava", 1), text_only()],
        r"sample 1 lacks \['pixel_values'\].*break off there",
    ),
    "more later": (
        lambda: [text_only(), text_only() | {"labels": torch.zeros(1, 9)}],
        r"its \['labels'\] would be dropped",
    ),
    "cut short": (
        lambda: [
            {k: v[:, :5] if v.ndim == 2 else v for k, v in text_only().items()}
            | {"pixel_values": torch.zeros(1, 3, 32, 32)}
        ],
        "0 image tokens .* and pixel_values",
    ),
    "no pixels": (
        lambda: [{"input_ids": torch.full((1, 16), IMAGE_TOKEN)}],
        "16 image tokens .* and no pixel_values",
    ),
    "raw text": (lambda: [{"text": "hello"}], "sample 0 has no input_ids"),
    "nothing": (list, "holds no samples"),
    "an iterator": (lambda: iter([text_only()]), "read only once"),
}


@pytest.mark.parametrize("case", BAD_CALIBRATION)
def test_calibration_that_would_lose_images_is_refused(case):
    samples, message = BAD_CALIBRATION[case]
    with pytest.raises(CalibrationError, match=message):
        validate_calibration(build("llava"), samples())


# What cannot work says so, before anything is changed


def unchanged(model, before) -> bool:
    return all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not hasattr(
        model, "hipp_plan"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Exactly one of plan and preference"),
        ({"plan": "p.json", "preference": {"utility": 1}}, "Exactly one of plan and preference"),
        ({"plan": "p.json", "round_to": 8}, "go with a preference"),
        ({"plan": "p.json", "pruning_ratio": 0.2}, "go with a preference"),
        ({"plan": "p.json", "mode": "sparse"}, "'shrink' or 'mask'"),
        ({"plan": 7}, "plan"),
        ({"preference": {"utility": -1}}, "finite number of 0 or more"),
        ({"preference": {"speed": 1}}, "'utility', 'robustness' or 'compression'"),
        ({"preference": [1, 2, 3]}, "preference"),
        ({"preference": {"utility": 1}, "pruning_ratio": 1.0}, "less than 1"),
        ({"preference": {"utility": 1}, "round_to": 0}, "greater than or equal to 1"),
        ({"plan": "p.json", "ratio": 0.2}, "ratio"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HippStructuredPruningModifier(**arguments)


@pytest.mark.parametrize("mode", ["shrink", "mask"])
def test_plans_that_do_not_fit_are_refused(dense, tmp_path, mode):
    model = dense("llava")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match="another model than this Llava"):
        oneshot(
            model=model,
            recipe=[HippStructuredPruningModifier(plan=random_plan(build("llama")), mode=mode)],
        )
    with pytest.raises(PlanError, match="There is no plan at"):
        oneshot(
            model=model,
            recipe=[HippStructuredPruningModifier(plan=tmp_path / "none.json", mode=mode)],
        )
    assert unchanged(model, before)


def test_a_preference_that_no_rounding_allows_is_refused(dense):
    model = dense("llava")
    wish = HippStructuredPruningModifier(preference={"utility": 1}, pruning_ratio=0.99)
    with pytest.raises(BudgetError, match="cannot be met"):
        oneshot(model=model, recipe=[wish], **data("llava"))


@pytest.mark.parametrize("mode", ["shrink", "mask"])
def test_pruning_after_quantising_is_refused(dense, mode):
    model = dense("llama")
    plan, before = random_plan(model), copy.deepcopy(model.state_dict())
    recipe = [QUANTISERS["W8A8"](), HippStructuredPruningModifier(plan=plan, mode=mode)]
    with pytest.raises(
        RecipeError,
        match=r"came after the model was quantised \(QuantizationModifier.*first in the recipe",
    ):
        oneshot(model=model, recipe=recipe)
    assert all(torch.equal(model.get_parameter(n), v) for n, v in before.items())
    oneshot(model=(fresh := dense("llama")), recipe=[QUANTISERS["W8A8"]()])
    with pytest.raises(RecipeError, match=r"quantised \(in an earlier call"):
        oneshot(model=fresh, recipe=[HippStructuredPruningModifier(plan=plan, mode=mode)])


def test_the_core_refuses_quantised_layers_packed_or_not(dense, tmp_path):
    model = dense("llama")
    plan = random_plan(model)
    oneshot(model=model, recipe=[QUANTISERS["W4A16"]()])
    for change in (prune, zero_units):
        with pytest.raises(
            UnsupportedModelError, match="that is quantised.*Prune before you quantise"
        ):
            change(model, plan)
    model.save_pretrained(tmp_path / "a")  # packs the weights in memory, too
    with pytest.raises(UnsupportedModelError, match="that is quantised.*Prune before you quantise"):
        prune(model, plan)


def test_widths_that_do_not_divide_are_named_with_a_round_to_that_works(dense):
    model, inputs = dense("llava_gqa"), batch("llava_gqa")
    before = copy.deepcopy(model.state_dict())
    plan = plan_for(model, 1)
    wrong = [g.name for g in plan.groups if g.kind == "ffn" and g.keep % GROUP]
    with pytest.raises(RecipeError, match="Nothing was pruned") as refusal:
        oneshot(
            model=model, recipe=[HippStructuredPruningModifier(plan=plan), QUANTISERS["W4A16"]()]
        )
    assert (
        wrong
        and all(f"{name} keeps" in str(refusal.value) for name in wrong)
        and unchanged(model, before)
    )
    round_to = int(re.search(r"round_to=(\d+)", str(refusal.value))[1])
    recipe = [HippStructuredPruningModifier(plan=plan_for(model, round_to)), QUANTISERS["W4A16"]()]
    oneshot(model=model, recipe=recipe)
    assert logits(model, inputs).isfinite().all()


def test_widths_that_no_round_to_can_mend_are_named(dense):
    model = dense("llama")  # 44 FFN channels
    recipe = [
        HippStructuredPruningModifier(plan=plan_for(model)),
        QuantizationModifier(**grouped(48)),
    ]
    with pytest.raises(
        RecipeError, match=r"No round_to can help language\.0\.ffn.*smaller group_size"
    ):
        oneshot(model=model, recipe=recipe)


@pytest.mark.parametrize(
    "other",
    [lambda: QuIPModifier(targets="Linear"), lambda: SpinQuantModifier(rotations=["R1", "R4"])],
)
def test_masks_beside_rotations_that_would_fill_them_are_refused(dense, other):
    model = dense("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RecipeError, match="what was zero is filled again"):
        oneshot(
            model=model,
            recipe=[HippStructuredPruningModifier(plan=random_plan(model), mode="mask"), other()],
        )
    assert unchanged(model, before)


class RefillModifier(Modifier):
    """A third party's modifier that moves every weight a little."""

    def on_initialize(self, state, **kwargs):
        return True

    def on_calibration_end(self, state, event, **kwargs):
        for parameter in state.model.parameters():
            parameter.data += 0.01


def test_zeros_that_another_modifier_filled_are_noticed(dense):
    model = dense("llama")
    plan = random_plan(model)
    recipe = [HippStructuredPruningModifier(plan=plan, mode="mask"), RefillModifier()]
    with pytest.raises(
        RecipeError, match=r"\d+ weights that mode=.mask. had set to zero are no longer zero"
    ):
        oneshot(model=model, recipe=recipe)


# The import


IMPORTS = """
    import importlib.util, json, os, sys, time
    import torch, transformers, hipp_ext
    hosts = ("llmcompressor", "compressed_tensors")
    found = {"core": [m for m in sys.modules if m.startswith(hosts)]}
    sys.modules["llmcompressor"] = None
    try:
        import hipp_ext.integrations.llm_compressor
    except ImportError as error:
        found["missing"] = [type(error).__name__, str(error)]
    del sys.modules["llmcompressor"]
    found["environment"] = os.environ.get("LLM_COMPRESSOR_LOG_DISABLED")

    from loguru import logger
    lines = []
    logger.add(lines.append, format="{message}", level="INFO")

    def stock_logging():  # the file that llm-compressor's import runs first
        folder = importlib.util.find_spec("llmcompressor").submodule_search_locations[0]
        spec = importlib.util.spec_from_file_location("stock_logger", folder + "/logger.py")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))

    os.environ["LLM_COMPRESSOR_LOG_DISABLED"] = "true"
    stock_logging()
    found["stock, switched off: level METRIC"] = "METRIC" in logger._core.levels
    del os.environ["LLM_COMPRESSOR_LOG_DISABLED"]
    start = time.process_time()
    from hipp_ext.integrations.llm_compressor_host import import_llmcompressor
    before_host = time.process_time()
    import_llmcompressor()
    after_host = time.process_time()
    import hipp_ext.integrations.llm_compressor
    found["seconds"] = time.process_time() - after_host + before_host - start
    from llmcompressor.utils.dev import get_main_device
    logger.info("mine")
    get_main_device()
    found["lines"] = lines[:]
    found["level METRIC"] = "METRIC" in logger._core.levels
    found["files"] = os.listdir(".")
    stock_logging()
    logger.info("lost")
    found["stock: sink survives"] = "lost" in "".join(lines)
    print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def imports(tmp_path_factory) -> dict:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LLM_COMPRESSOR")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(IMPORTS)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path_factory.mktemp("empty"),
        env=environment,
    )
    return json.loads(done.stdout.partition("FOUND")[2]) | {
        "printed": done.stdout.partition("FOUND")[0]
    }


def test_the_import_is_lazy_light_and_leaves_the_process_alone(imports):
    assert imports["core"] == []
    assert imports["seconds"] < 1
    assert imports["files"] == [] and imports["environment"] is None
    assert (
        "mine" in "".join(imports["lines"])
        and "No accelerator" in "".join(imports["lines"])
        or torch.cuda.is_available()
    )
    assert imports["level METRIC"]


def test_a_missing_llm_compressor_names_the_extra(imports):
    assert (
        imports["missing"][0] == "MissingExtraError"
        and 'pip install "hipp-ext[llm-compressor]"' in imports["missing"][1]
    )


# Canaries: each fails when upstream has mended what is worked around here


def test_canary_llm_compressors_import_takes_the_log_sinks(imports):
    assert not imports["stock: sink survives"], (
        "llm-compressor keeps sinks: import_llmcompressor may import it plainly"
    )


def test_canary_switched_off_logging_lacks_a_level(imports):
    assert not imports["stock, switched off: level METRIC"], (
        "METRIC is always there: import_llmcompressor need not add it"
    )


def test_generation_settings_are_saved_as_they_were_and_adapters_are_not(dense, tmp_path):
    model = dense("llama")
    model.generation_config.update(temperature=0.9, do_sample=False)
    oneshot(model=model, recipe=[HippStructuredPruningModifier(plan=plan_for(model))])
    model.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a/generation_config.json").read_text())["temperature"] == 0.9
    assert torch.equal(
        logits(load_pruned(tmp_path / "a"), batch("llama")), logits(model, batch("llama"))
    )
    model.add_adapter(pytest.importorskip("peft").LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(UnsupportedModelError, match="carries adapters"):
        model.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_numbers_of_the_modifier_may_be_of_numpy_and_not_truth_values():
    import numpy as np

    wish = {"utility": 1, "robustness": 0, "compression": 0}
    made = HippStructuredPruningModifier(
        preference=wish, round_to=np.int64(8), pruning_ratio=np.float32(0.25)
    )
    assert (made.round_to, made.pruning_ratio) == (8, 0.25) and type(made.round_to) is int
    for name in ("round_to", "pruning_ratio"):
        with pytest.raises(ValueError, match=f"{name}.*\n.*a number is needed, not True"):
            HippStructuredPruningModifier(preference=wish, **{name: True})


@pytest.mark.timeout(120)
def test_canary_the_configuration_is_replaced_on_saving(dense, tmp_path):
    model = prune(dense("llama"), random_plan(dense("llama")), inplace=True)
    oneshot(model=model, recipe=[QUANTISERS["W8A8"]()], output_dir=str(tmp_path / "a"))
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert "per_layer_config" not in config, (
        "llm-compressor keeps widths: _without_origin in llm_compressor_host.py may go"
    )


@pytest.mark.timeout(120)
def test_canary_a_quantised_llava_names_ignored_layers_as_in_the_checkpoint(dense, tmp_path):
    model, inputs = dense("llava"), batch("llava")
    oneshot(model=model, recipe=[QUANTISERS["W8A8"]()], output_dir=str(tmp_path / "a"))
    stock = type(model).from_pretrained(tmp_path / "a").eval()
    same = torch.equal(logits(stock, inputs), logits(model, inputs))
    assert not same, (
        "transformers reads llm-compressor's ignore list: _name_unquantised in checkpoint.py may go"
    )


@pytest.mark.timeout(120)
def test_canary_a_copy_saves_the_original(dense, tmp_path):
    model = dense("llama")
    oneshot(
        model=model,
        recipe=[WandaPruningModifier(targets=["LlamaMLP"], sparsity=0.5)],
        **data("llama"),
    )
    copied = copy.deepcopy(model)
    copied.model.norm.weight.data.fill_(7)
    copied.save_pretrained(tmp_path / "a")
    saved = type(model).from_pretrained(tmp_path / "a").model.norm.weight
    assert not (saved == 7).all(), (
        "copies save themselves: forget_bound_methods in surgery.py has one reason less"
    )


@pytest.mark.timeout(120)
def test_canary_too_few_columns_for_a_group_pass_the_check(dense):
    from llmcompressor.modifiers.quantization.group_size_validation import (
        get_layers_indivisible_by_group_size,
    )

    model = dense("llama")
    for m in model.modules():
        if isinstance(m, torch.nn.Linear):
            scheme = QuantizationModifier(**grouped(128)).resolved_config.config_groups["group_0"]
            m.quantization_scheme = scheme
    assert not get_layers_indivisible_by_group_size(model, {"Linear"}, []), (
        "llm-compressor checks narrow layers: check_group_sizes remains for its advice only, its "
        "docstring should change"
    )


@pytest.mark.timeout(120)
def test_canary_the_first_sample_decides_whether_images_are_seen(dense):
    def images_seen(samples: list[dict]) -> int:
        model, seen = dense("llava"), []
        model.model.vision_tower.register_forward_hook(lambda *_: seen.append(1))
        loader = DataLoader(samples, batch_size=None)
        oneshot(
            model=model, recipe=[GPTQModifier(**grouped())], dataset=loader, processor=NoProcessor()
        )
        return len(seen)

    image, text = batch("llava", 1), text_only()
    assert images_seen([image, image]) >= 2
    assert images_seen([text, image]) == 0, (
        "images after text are seen: validate_calibration may accept them"
    )
    with pytest.raises(Exception, match="pixel_values"):
        images_seen([image, text])
