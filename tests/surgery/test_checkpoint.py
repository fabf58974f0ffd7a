"""What is saved loads again to the bit; what is damaged says so."""

import contextlib
import copy
import json
import logging
import os
import random
import resource
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from models import VARIED, batch, build
from plans import logits, random_plan
from transformers import AutoConfig

from hipp_ext import load_pruned, pad_to_uniform, prune, save_pruned
from hipp_ext.calibration import find_processor
from hipp_ext.errors import (
    CheckpointError,
    HippError,
    OutputExistsError,
    PlanError,
    UnsupportedModelError,
)
from hipp_ext.files import content_hash
from hipp_ext.groups import find_groups
from hipp_ext.testbed import WEIGHTS
from hipp_ext.units import plan_from_counts


@pytest.mark.parametrize("name", VARIED)
def test_save_and_load_are_exact(name, tmp_path):
    model, inputs = build(name), batch(name)
    small = prune(model, random_plan(model))
    save_pruned(small, tmp_path / "a")
    loaded = load_pruned(tmp_path / "a")
    assert type(loaded) is type(model) and not loaded.training
    assert torch.equal(logits(loaded, inputs), logits(small, inputs))
    generation = dict(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(loaded.generate(**generation), small.generate(**generation))
    assert loaded.hipp_plan == small.hipp_plan
    save_pruned(loaded, tmp_path / "b")
    assert torch.equal(logits(load_pruned(tmp_path / "b"), inputs), logits(small, inputs))


@pytest.mark.parametrize("name", VARIED)
def test_the_padded_model_loads_with_stock_transformers(name, tmp_path):
    model, inputs = build(name), batch(name)
    small = prune(model, random_plan(model))
    pad_to_uniform(small).save_pretrained(tmp_path)
    stock = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(logits(stock, inputs), logits(small, inputs), atol=1e-5)
    generation = dict(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(stock.generate(**generation), small.generate(**generation))


def test_the_folder_holds_standard_per_layer_config_and_the_plan(tmp_path):
    model = build("llava_gqa")
    plan = random_plan(model)
    save_pruned(prune(model, plan), tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())["text_config"]
    for layer in range(3):
        counts = plan.keep_counts
        usual = {
            k: config[k]
            for k in ("intermediate_size", "num_attention_heads", "num_key_value_heads")
        }
        assert usual | config["per_layer_config"].get(str(layer), {}) == {
            "intermediate_size": counts[f"language.{layer}.ffn"],
            "num_key_value_heads": counts[f"language.{layer}.attention"],
            "num_attention_heads": 4 * counts[f"language.{layer}.attention"],
        }
    AutoConfig.from_pretrained(tmp_path / "a")
    from hipp_ext import PruningPlan

    assert PruningPlan.load(tmp_path / "a/hipp_plan.json") == plan


def test_stock_from_pretrained_refuses_loudly(tmp_path):
    model = build("llava")
    save_pruned(prune(model, random_plan(model)), tmp_path / "a")
    with pytest.raises(RuntimeError, match="mismatch"):
        type(model).from_pretrained(tmp_path / "a")


def test_ordinary_folders_load_too(tmp_path):
    model, inputs = build("llava"), batch("llava")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_pruned(tmp_path), inputs), logits(model, inputs))


def test_dtype_and_device_are_honoured(tmp_path):
    model = build("llava").to(torch.bfloat16)
    save_pruned(prune(model, random_plan(model)), tmp_path / "a")
    assert load_pruned(tmp_path / "a").dtype == torch.bfloat16
    assert load_pruned(tmp_path / "a", dtype=torch.float32, device="cpu").dtype == torch.float32


def test_a_pruned_vision_tower_comes_back(tmp_path):
    model, inputs = build("llava"), batch("llava")
    small = prune(model, random_plan(model, towers=("language", "vision")))
    save_pruned(small, tmp_path / "a")
    assert torch.equal(logits(load_pruned(tmp_path / "a"), inputs), logits(small, inputs))


def test_both_towers_pruned_one_after_the_other_come_back_and_can_be_padded(tmp_path):
    model, inputs = build("llava"), batch("llava")
    small = prune(model, random_plan(model))
    small = prune(small, random_plan(small, towers=("vision",)))
    save_pruned(small, tmp_path / "a")
    assert torch.equal(logits(load_pruned(tmp_path / "a"), inputs), logits(small, inputs))
    pad_to_uniform(small).save_pretrained(tmp_path / "b")
    assert torch.allclose(
        logits(type(model).from_pretrained(tmp_path / "b").eval(), inputs),
        logits(small, inputs),
        atol=1e-5,
    )


def test_a_missing_tensor_is_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    model = build("llava")
    save_pruned(prune(model, random_plan(model)), tmp_path / "a")
    tensors = load_file(tmp_path / "a/model.safetensors")
    tensors.pop(next(name for name in tensors if "down_proj" in name))
    save_file(tensors, tmp_path / "a/model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="no weights for .*down_proj"):
        load_pruned(tmp_path / "a")


def test_an_existing_folder_is_kept_unless_told_otherwise(tmp_path):
    model = build("llama")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="exists"):
        save_pruned(model, tmp_path / "a")
    assert (tmp_path / "a/thesis.txt").read_text() == "years of work"
    save_pruned(model, tmp_path / "a", overwrite=True)
    assert not (tmp_path / "a/thesis.txt").exists() and load_pruned(tmp_path / "a")


def test_an_error_while_saving_leaves_nothing_behind(tmp_path):
    model = prune(build("llama"), random_plan(build("llama")))
    model.hipp_plan = model.hipp_plan.replace(notes={"bad": object()})  # cannot be written as JSON
    with pytest.raises(TypeError):
        save_pruned(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_widths_are_those_of_the_weights_whoever_saved_them(tmp_path, recwarn):
    """hipp_ext.json is gone where a Trainer saved the model, and stale where that went into the
    folder of another.
    """
    model, inputs = build("llava_gqa"), batch("llava_gqa")
    small = prune(model, random_plan(model, towers=("language", "vision")))
    small.save_pretrained(tmp_path / "a")
    loaded = load_pruned(tmp_path / "a")
    assert torch.equal(logits(loaded, inputs), logits(small, inputs)) and not hasattr(
        loaded, "hipp_plan"
    )
    save_pruned(prune(model, random_plan(model, seed=1)), tmp_path / "b")
    small.save_pretrained(tmp_path / "b")
    stale = load_pruned(tmp_path / "b")
    assert torch.equal(logits(stale, inputs), logits(small, inputs)) and not hasattr(
        stale, "hipp_plan"
    )
    assert any("is not the plan of the weights" in str(w.message) for w in recwarn)
    save_pruned(small, tmp_path / "c")
    for damage in (
        lambda m: m["groups"][1].update(width=3),
        lambda m: m["groups"].__delitem__(slice(6, None)),
    ):
        edit(tmp_path / "c/hipp_ext.json", damage)
        loaded = load_pruned(tmp_path / "c")
        assert (
            torch.equal(logits(loaded, inputs), logits(small, inputs))
            and loaded.hipp_plan == small.hipp_plan
        )


def test_what_a_config_says_of_its_layers_is_kept(tmp_path):
    model, inputs = build("llama"), batch("llama")
    model.config.per_layer_config = {1: {"attention_dropout": 0.25}}
    small = prune(model, random_plan(model))
    small = prune(small, random_plan(small, seed=1))
    save_pruned(small, tmp_path / "a")
    loaded = load_pruned(tmp_path / "a")
    assert torch.equal(logits(loaded, inputs), logits(small, inputs))
    padded = pad_to_uniform(loaded)
    for config in (loaded.config, padded.config):
        assert [c.attention_dropout for c in config.per_layer_config] == [0, 0.25, 0]
    assert len({c.intermediate_size for c in padded.config.per_layer_config}) == 1


def adapted(kind: str):
    from peft import (
        IA3Config,
        LoraConfig,
        PromptTuningConfig,
        get_peft_model,
        inject_adapter_in_model,
    )

    model = build("llava")
    lora = LoraConfig(
        r=2, target_modules=["linear_1", "linear_2"]
    )  # the projector's, outside of all groups
    if kind == "add_adapter":
        model.add_adapter(lora)
        return model
    if kind == "injected":
        return inject_adapter_in_model(lora, model)
    if kind == "below":
        model.model.multi_modal_projector = get_peft_model(model.model.multi_modal_projector, lora)
        return model
    other = {
        "PeftModel": lora,
        "IA3": IA3Config(target_modules=["linear_1"], feedforward_modules=["linear_1"]),
        "prompts": PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=2,
            token_dim=40,
            num_layers=3,
            num_attention_heads=4,
            num_transformer_submodules=1,
        ),
    }
    return get_peft_model(model, other[kind])


@pytest.mark.parametrize(
    "kind", ["PeftModel", "IA3", "prompts", "add_adapter", "injected", "below"]
)
def test_a_model_with_adapters_is_refused_and_nothing_is_destroyed(tmp_path, kind):
    pytest.importorskip("peft")
    save_pruned(build("llama"), tmp_path / "a")
    before = content_hash(tmp_path)
    for name in ("a", "b"):
        with pytest.raises(
            UnsupportedModelError, match=r"carries adapters .*merge_and_unload.*Nothing was written"
        ):
            save_pruned(adapted(kind), tmp_path / name, overwrite=True)
    assert content_hash(tmp_path) == before


def test_merged_adapters_are_saved(tmp_path):
    pytest.importorskip("peft")
    model, inputs = adapted("PeftModel"), batch("llava")
    for name, parameter in model.named_parameters():
        parameter.data += 0.1 * ("lora_B" in name)
    merged = model.merge_and_unload()
    assert not torch.equal(logits(merged, inputs), logits(build("llava"), inputs))
    save_pruned(merged, tmp_path / "a")
    assert torch.equal(logits(load_pruned(tmp_path / "a"), inputs), logits(merged, inputs))


def test_generation_settings_stay_as_they_were(tmp_path):
    model = build("llama")
    model.generation_config.update(temperature=0.9, top_p=0.6, do_sample=False)
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "stock")
    save_pruned(prune(model, random_plan(model)), tmp_path / "a")
    loaded = load_pruned(tmp_path / "a")
    save_pruned(loaded, tmp_path / "b")
    for name in "ab":
        settings = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert (settings["temperature"], settings["top_p"]) == (0.9, 0.6)
    assert (
        type(loaded.generation_config).__name__ == "GenerationConfig"
        and loaded.generation_config.top_p == 0.6
    )


def test_a_static_cache_in_chunks_gives_the_same_tokens(tmp_path):
    model, inputs = build("llama"), batch("llama", length=11)
    small = prune(model, random_plan(model))
    save_pruned(small, tmp_path / "a")
    usual = dict(**inputs, max_new_tokens=5, do_sample=False)
    for other in (small, copy.deepcopy(small), load_pruned(tmp_path / "a")):
        chunks = other.generate(**usual, cache_implementation="static", prefill_chunk_size=4)
        assert torch.equal(chunks, small.generate(**usual))


SHARED_SIZES = {
    "a pooling head": (
        ("language", "vision"),
        lambda tf, text, vision: tf.LlavaOnevisionForConditionalGeneration(
            tf.LlavaOnevisionConfig(
                vision_config=vision | {"model_type": "siglip_vision_model"},
                text_config=text | {"model_type": "qwen2"},
                image_token_id=5,
                video_token_id=6,
                image_grid_pinpoints=[[32, 32]],
            )
        ),
    ),
    "a connector": (
        ("language",),
        lambda tf, text, vision: tf.Idefics2ForConditionalGeneration(
            tf.Idefics2Config(
                text_config=text | {"model_type": "mistral"},
                vision_config=vision,
                image_token_id=5,
                perceiver_config=dict(
                    resampler_n_latents=4,
                    resampler_depth=1,
                    resampler_n_heads=2,
                    resampler_head_dim=8,
                    num_key_value_heads=1,
                    hidden_size=32,
                ),
            )
        ),
    ),
    "square projections": (
        ("language",),
        lambda tf, text, vision: tf.HeliumForCausalLM(tf.HeliumConfig(**text, head_dim=8)),
    ),
}


@pytest.mark.parametrize("name", SHARED_SIZES)
def test_padding_where_other_modules_are_built_from_the_same_sizes(tmp_path, name):
    import transformers

    towers, make = SHARED_SIZES[name]
    sizes = dict(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    vision = dict(
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=32,
        patch_size=8,
    )
    model, inputs = (
        make(transformers, sizes, vision).eval(),
        {"input_ids": torch.arange(10, 19)[None]},
    )
    groups = find_groups(model, towers)
    keep = [max(1, g.width // 2) for g in groups]
    small = prune(
        model, plan_from_counts(groups, keep, {g.name: torch.rand(g.width) for g in groups})
    )
    padded = pad_to_uniform(small)
    padded.save_pretrained(tmp_path)
    assert torch.allclose(
        logits(type(model).from_pretrained(tmp_path).eval(), inputs),
        logits(small, inputs),
        atol=1e-5,
    )
    narrow = {
        g.kind
        for g, dense in zip(find_groups(padded), find_groups(model), strict=True)
        if g.width < dense.width
    }
    assert (
        narrow
        == {"a pooling head": {"ffn"}, "a connector": {"attention"}, "square projections": {"ffn"}}[
            name
        ]
    )


def test_what_stock_cannot_build_is_not_padded():
    model = build("llama")
    model.lm_head = torch.nn.Linear(48, 50)
    with pytest.raises(UnsupportedModelError, match="cannot be padded.*lm_head"):
        pad_to_uniform(prune(model, random_plan(model)))


def test_options_are_honoured_or_refused(saved):
    for options in (
        {"torch_dtype": torch.bfloat16},
        {"dtype": "bfloat16"},
        {"torch_dtype": "torch.bfloat16", "dtype": None},
    ):
        assert load_pruned(saved, **options).dtype == torch.bfloat16
    assert load_pruned(saved, dtype="auto").dtype == torch.float32
    refused = [
        ({"dtype": "bfloat17"}, "dtype='bfloat17': a floating-point"),
        ({"dtype": torch.int8}, "floating-point torch.dtype"),
        ({"dtype": 16}, "dtype=16"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "say different things"),
        ({"device": "gpu7"}, "device 'gpu7' cannot be used here"),
        ({"device": "cpu", "device_map": "auto"}, "give one of them"),
        ({"trust_remote_code": True}, "does not take trust_remote_code"),
        ({"use_safetensors": False, "subfolder": "x"}, "does not take subfolder, use_safetensors"),
    ]
    for options, message in refused:
        with pytest.raises(CheckpointError, match=message):
            load_pruned(saved, **options)
    with pytest.raises(TypeError, match="no_such_option"):
        load_pruned(saved, no_such_option=1)


def test_a_name_of_the_hub_says_how_to_download_it(tmp_path):
    with pytest.raises(
        CheckpointError, match="hf download llava-hf/llava-1.5-7b-hf --local-dir llava-1.5-7b-hf"
    ):
        load_pruned("llava-hf/llava-1.5-7b-hf")
    with pytest.raises(CheckpointError, match="config.json.$"):
        load_pruned(tmp_path)


@pytest.mark.parametrize("own_class", [False, True])
def test_no_code_of_a_folder_is_run_or_asked_for(tmp_path, monkeypatch, own_class):
    folder = tmp_path / "model"
    shutil.copytree(WEIGHTS, folder)
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n"
    (folder / "custom_generate").mkdir()
    for file in ("own.py", "custom_generate/generate.py"):
        (folder / file).write_text(code)
    names = (
        "AutoConfig",
        "AutoModelForImageTextToText",
        "AutoModelForCausalLM",
        "AutoProcessor",
        "AutoTokenizer",
    )
    for file in ("config.json", "processor_config.json", "tokenizer_config.json"):
        edit(folder / file, lambda c: c.update(auto_map=dict.fromkeys(names, "own.Own")))
        if own_class and file != "config.json":
            edit(folder / file, lambda c: c.update(processor_class="Own", tokenizer_class="Own"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    model = load_pruned(folder)
    model.generate(torch.tensor([[1, 11]]), max_new_tokens=1)
    with (
        pytest.warns(UserWarning, match="could not be loaded.*execute")
        if own_class
        else contextlib.nullcontext()
    ):
        assert (find_processor(model) is None) == own_class
    assert not (tmp_path / "ran").exists()


def test_loading_is_quiet_about_widths(saved):
    """Also where it is the first thing that a process does."""
    logger = logging.getLogger("transformers.integrations.heterogeneity.configuration_utils")
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger.filters.clear()
    getattr(
        logger.warning_once, "cache_clear", getattr(type(logger).warning_once, "cache_clear", None)
    )()
    logger.addHandler(handler)
    try:
        load_pruned(saved)
    finally:
        logger.removeHandler(handler)
    assert heard == []


MUTATIONS = [
    None,
    True,
    -1,
    0,
    10**12,
    1e30,
    float("nan"),
    "",
    "x",
    "../x",
    [],
    {},
    [[]],
    10**40,
    "bfloat16",
]


@pytest.mark.parametrize(
    "file", ["config.json", "hipp_ext.json", "hipp_plan.json", "model.safetensors"]
)
def test_mutated_folders_load_or_say_so(saved, file):
    """Anything else than a model or an error of errors.py fails, and so does taking long."""
    draw, path = random.Random(file), saved / file
    before = path.read_bytes()
    for _ in range(25):
        if path.suffix == ".json" and draw.random() < 0.7:
            content = json.loads(before)
            holder = content
            while (
                inner := [
                    v
                    for v in (holder.values() if isinstance(holder, dict) else holder)
                    if v and isinstance(v, dict | list)
                ]
            ) and draw.random() < 0.7:
                holder = draw.choice(inner)
            key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            holder[key] = draw.choice(MUTATIONS)
            path.write_text(json.dumps(content))
        else:
            data = bytearray(before)
            for _ in range(draw.choice([1, 4])):
                data[draw.randrange(min(len(data), 3000))] = draw.randrange(256)
            path.write_bytes(data[: draw.choice([None, draw.randrange(len(data))])])
        start = time.process_time()
        with contextlib.suppress(HippError), warnings.catch_warnings(action="ignore"):
            load_pruned(saved)
        assert time.process_time() - start < 10


@pytest.fixture
def saved(tmp_path) -> Path:
    model = build("llava")
    return save_pruned(prune(model, random_plan(model)), tmp_path / "model")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


DAMAGES = {
    "no folder": (lambda d: d.rename(d.parent / "gone"), "does not exist"),
    "config cut": (lambda d: truncate(d / "config.json"), "config.json is damaged"),
    "weights cut": (lambda d: truncate(d / "model.safetensors"), "incomplete or damaged"),
    "weights gone": (lambda d: (d / "model.safetensors").unlink(), "incomplete or damaged"),
    "manifest cut": (lambda d: truncate(d / "hipp_ext.json"), "hipp_ext.json is damaged"),
    "width as text": (
        lambda d: edit(d / "hipp_ext.json", lambda m: m["groups"][0].update(width="9")),
        r"groups\.0\.width",
    ),
    "a group gone": (
        lambda d: edit(d / "hipp_ext.json", lambda m: m["groups"].pop(0)),
        "lists other groups",
    ),
    "unknown class": (
        lambda d: edit(d / "config.json", lambda c: c.update(architectures=["os.system"])),
        "does not have",
    ),
    "plan cut": (lambda d: truncate(d / "hipp_plan.json"), "Not a pruning plan"),
    "no regular file": (lambda d: pipe(d / "hipp_plan.json"), "is not a regular file"),
    "a folder for a file": (
        lambda d: pipe(d / "hipp_ext.json", os.mkdir),
        "hipp_ext.json is damaged",
    ),
    "deep": (lambda d: (d / "config.json").write_text("[" * 100_000), "config.json is damaged"),
    "no object": (lambda d: (d / "config.json").write_text("3"), "holds no object"),
    "huge file": (lambda d: os.truncate(d / "config.json", 1 << 40), "too many for this file"),
    "huge layer": (lambda d: text(d, hidden_size=10**12), "hidden_size 1000000000000"),
    "huge vocabulary": (lambda d: text(d, vocab_size=10**9), "has the shape"),
    "many layers": (lambda d: text(d, num_hidden_layers=10**9), "num_hidden_layers 1000000000"),
    "many labels": (
        lambda d: edit(d / "config.json", lambda c: c.update(num_labels=10**9)),
        "num_labels 1000000000",
    ),
    "more layers": (
        lambda d: text(d, num_hidden_layers=100, layer_types=None),
        "do not have|lists other groups",
    ),
    "wrong type": (lambda d: text(d, num_attention_heads="four"), "incomplete or damaged"),
    "kernels": (
        lambda d: text(d, attn_implementation="them/theirs"),
        "asks for code from elsewhere",
    ),
    "other weights": (
        lambda d: edit(d / "config.json", lambda c: c.update(transformers_weights="../x")),
        "names its weights",
    ),
    "pickled": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "pytorch_model.bin is pickled",
    ),
    "outside": (lambda d: index(d, "../model.safetensors"), "no safetensors file of this folder"),
    "outside, absolute": (
        lambda d: index(d, f"{d}/model.safetensors"),
        "no safetensors file of this folder",
    ),
    "a name too long for a file": (
        lambda d: index(d, "x" * 5000 + ".safetensors"),
        "no safetensors file of this folder",
    ),
    "pickled in parts": (lambda d: index(d, "a.bin"), "no safetensors file of this folder"),
    "index without map": (lambda d: index(d, None), "lists no files"),
    "adapters": (lambda d: (d / "adapter_config.json").write_text("{}"), "holds adapters"),
    "code": (
        lambda d: edit(
            d / "config.json",
            lambda c: c.update(architectures=["Own"], auto_map={"AutoModel": "own.Own"}),
        ),
        "needs Python code that lies in the folder",
    ),
}


def text(folder: Path, **values) -> None:
    edit(folder / "config.json", lambda c: c["text_config"].update(values))


def index(folder: Path, place: str | None) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": place} if place else 7})
    )


def pipe(path: Path, make=os.mkfifo) -> None:
    path.unlink()
    make(path)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_says_what_is_wrong(saved, name):
    damage, message = DAMAGES[name]
    damage(saved)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((CheckpointError, PlanError), match=message):
        load_pruned(saved)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, (
        "took memory [KiB] for what is not there"
    )


@pytest.mark.parametrize("delay", [0.01, 0.05, 0.12, 0.31])
def test_kill_9_during_a_save_leaves_a_whole_folder_or_none(tmp_path, delay):
    model, folder = build("llava"), tmp_path / "model"
    small = prune(model, random_plan(model))
    process = os.fork()
    if not process:
        try:
            while True:
                save_pruned(small, folder, overwrite=True)
        finally:
            os._exit(1)
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(process, 0)[1]), "saving ended with an error"
    if folder.exists():
        assert {g.name for g in find_groups(load_pruned(folder))}
    save_pruned(small, folder, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and {
        p.name[0] for p in folder.iterdir()
    } <= set("cghm")
