"""What is saved loads again to the bit; what is damaged says so."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from models import BUILDERS, batch, build
from test_surgery import logits, random_plan
from transformers import AutoConfig

from hipp_ext import load_pruned, pad_to_uniform, prune, save_pruned
from hipp_ext.errors import CheckpointError, OutputExistsError, PlanError
from hipp_ext.groups import find_groups


@pytest.mark.parametrize("name", BUILDERS)
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


@pytest.mark.parametrize("name", BUILDERS)
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
        usual = {k: config[k] for k in ("intermediate_size", "num_attention_heads", "num_key_value_heads")}
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
    assert torch.allclose(logits(type(model).from_pretrained(tmp_path / "b").eval(), inputs), logits(small, inputs), atol=1e-5)


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
    "no folder": (lambda d: d.rename(d.parent / "gone"), "has no config.json"),
    "config cut": (lambda d: truncate(d / "config.json"), "config.json is damaged"),
    "weights cut": (lambda d: truncate(d / "model.safetensors"), "incomplete or damaged"),
    "weights gone": (lambda d: (d / "model.safetensors").unlink(), "incomplete or damaged"),
    "manifest cut": (lambda d: truncate(d / "hipp_ext.json"), "hipp_ext.json is damaged"),
    "manifest gone": (lambda d: (d / "hipp_ext.json").unlink(), "incomplete or damaged"),
    "width as text": (lambda d: edit(d / "hipp_ext.json", lambda m: m["groups"][0].update(width="9")), r"groups\.0\.width"),
    "other widths": (lambda d: edit(d / "hipp_ext.json", lambda m: m["groups"][1].update(width=3)), "incomplete or damaged"),
    "a group gone": (lambda d: edit(d / "hipp_ext.json", lambda m: m["groups"].pop()), "lists other groups"),
    "unknown class": (lambda d: edit(d / "config.json", lambda c: c.update(architectures=["os.system"])), "does not have"),
    "plan cut": (lambda d: truncate(d / "hipp_plan.json"), "Not a pruning plan"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_says_what_is_wrong(saved, name):
    damage, message = DAMAGES[name]
    damage(saved)
    with pytest.raises((CheckpointError, PlanError), match=message):
        load_pruned(saved)


KILLED = """
    import sys; sys.path.insert(0, {tests!r})
    from models import build
    from test_surgery import random_plan
    from hipp_ext import prune, save_pruned
    model = build("llava")
    small = prune(model, random_plan(model))
    print("ready", flush=True)
    for i in range(1000):
        save_pruned(small, {folder!r}, overwrite=True)
"""


@pytest.mark.parametrize("delay", [0.05, 0.12, 0.31])
def test_kill_9_during_a_save_leaves_a_whole_folder_or_none(tmp_path, delay):
    folder = tmp_path / "model"
    script = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent), folder=str(folder))
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout and process.stdout.readline() == b"ready\n"
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    if folder.exists():
        assert {g.name for g in find_groups(load_pruned(folder))}
