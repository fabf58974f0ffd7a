"""`hipp doctor`: what it says is what pruning finds, on models without and with weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command import hipp, hipp_json
from models import batch, build, save_language_model
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM
from zoo import FAMILIES

from hipp_ext import Calibration, load_pruned, prune, save_pruned
from hipp_ext.allocators import Uniform
from hipp_ext.cli.doctor_text import count, duration, size
from hipp_ext.errors import CalibrationError, CheckpointError, DataError, HippError
from hipp_ext.evals.estimates import forward_flops, row_tokens
from hipp_ext.groups import find_groups, total_parameters
from hipp_ext.model_folder import read_folder
from hipp_ext.scorers import Magnitude
from hipp_ext.sensitivity.anchors import MEASURED_LEVELS, points_at
from hipp_ext.sensitivity.efforts import forward_passes
from hipp_ext.surgery.checkpoint import outline
from hipp_ext.testbed import WEIGHTS

CPU = ("--device", "cpu")
SIZES: dict = dict(
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=311,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A folder with the configuration of a Llama, and nothing else."""
    folder = tmp_path_factory.mktemp("doctor") / "llama"
    config = LlamaConfig(**SIZES, tie_word_embeddings=True, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


def test_a_folder_without_weights_is_enough(llama):
    found = hipp_json("doctor", llama, *CPU)
    real = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    assert found["parameters"] == sum(p.numel() for p in real.parameters())
    assert found["weights_bytes"] == 2 * found["parameters"] and found["dtype"] == "bfloat16"
    assert found["prunable_parameters"] == total_parameters(find_groups(real))
    assert found["tied"] == [["model.embed_tokens.weight", "lm_head.weight"]]
    assert "none lie in the folder" in found["weights_problem"]
    missing = {"kind": "tokenizer", "class": None, "problem": "none lies in the folder"}
    assert found["processor"] == missing and found["calibration"] == []
    assert [tower["tower"] for tower in found["towers"]] == ["language"]
    wide = hipp_json("doctor", llama, *CPU, "--dtype", "float32")
    assert wide["weights_bytes"] == 2 * found["weights_bytes"]


def test_the_testbed_in_words_at_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    told = hipp("doctor", "testbed", *CPU)
    tables = [line for line in told.splitlines() if line.startswith("  ")]
    assert len(tables) > 15 and max(map(len, tables)) <= 80
    for expected in ("LlavaProcessor", "8 KV groups", "hipp plan --effort anchored", "openvino"):
        assert expected in told
    assert told.splitlines()[-1].startswith("next: hipp plan testbed --calibration")


def test_towers_runtimes_and_hosts_of_the_testbed():
    found = hipp_json("doctor", "testbed", *CPU)
    named = {"kind": "processor", "class": "LlavaProcessor", "problem": None}
    assert json.dumps(found) and found["processor"] == named
    kinds = {t["tower"]: {k["kind"]: k["groups"] for k in t["kinds"]} for t in found["towers"]}
    assert kinds == {
        "language": {"attention": 6, "ffn": 6},
        "vision": {"attention": 3, "ffn": 3},
        "projector": {"ffn": 1},
    }
    runtimes = found["runtimes"]
    assert runtimes["transformers"]["free"] and not runtimes["transformers"]["stock"]
    assert not any(runtimes["hipp-ext"].values()) and not runtimes["llama.cpp"]["free"]
    steps = {one["command"]: one for one in found["estimates"]}
    efforts = [steps[f"plan --effort {e}"]["flops"] for e in ("fisher", "anchored", "measured")]
    assert efforts == sorted(efforts)
    assert steps["recover"]["bytes"] > steps["recover --train lora"]["bytes"]
    assert found["installed"]["torch"] == torch.__version__.partition("+")[0]
    for extra, line in found["missing_extras"].items():
        assert line == f'pip install "hipp-ext[{extra}]"' and extra not in ("all", "dev")


def test_a_pruned_folder_has_its_own_widths(tmp_path):
    model = load_pruned(WEIGHTS)
    plan = Uniform(pruning_ratio=0.4, scorer=Magnitude()).plan(model)
    small = prune(model, plan)
    save_pruned(small, tmp_path / "small")
    drawn = outline(read_folder(tmp_path / "small"))
    shapes = {name: tuple(p.shape) for name, p in small.named_parameters()}
    assert {name: tuple(p.shape) for name, p in drawn.named_parameters()} == shapes
    assert all(p.is_meta for p in drawn.parameters())
    found = hipp_json("doctor", tmp_path / "small", *CPU)
    assert found["already_pruned"] and found["weights_problem"] is None
    assert found["parameters"] == sum(p.numel() for p in small.parameters())


def test_what_stays_whole_and_what_is_refused(tmp_path):
    from transformers import Lfm2Config

    hybrid = Lfm2Config(**SIZES, layer_types=["conv", "full_attention", "full_attention"])
    mamba = FAMILIES["mamba2"].configuration()
    for config, name in ((hybrid, "Lfm2ForCausalLM"), (mamba, "Mamba2ForCausalLM")):
        config.architectures = [name]
        config.save_pretrained(tmp_path / name)
    language = hipp_json("doctor", tmp_path / "Lfm2ForCausalLM", *CPU)["towers"][0]
    assert "Lfm2ShortConv" in language["left_whole"][0] and language["kinds"]
    assert "--partial report" in hipp("doctor", tmp_path / "Lfm2ForCausalLM", *CPU)
    refused = hipp_json("doctor", tmp_path / "Mamba2ForCausalLM", *CPU)
    assert refused["towers"][0]["refused"] and refused["runtimes"] == {}
    told = hipp("doctor", tmp_path / "Mamba2ForCausalLM", *CPU)
    assert "language cannot be pruned: " in told and "next:" not in told


@pytest.mark.parametrize("name", ["inkling", "qwen3_vl", "deepseek_v2"])
def test_families_of_other_builds(name, tmp_path):
    config = FAMILIES[name].configuration()
    config.architectures = [FAMILIES[name].architecture]
    config.save_pretrained(tmp_path)
    found = hipp_json("doctor", tmp_path, *CPU)
    assert found["prunable_parameters"] and found["runtimes"]["hipp-ext"]["free"] == []


def test_weights_that_cannot_be_used_are_named(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "copy")
    file = tmp_path / "copy/config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    (tmp_path / "copy/pytorch_model.bin").write_bytes(b"")
    found = hipp_json("doctor", tmp_path / "copy", *CPU)
    assert found["quantisation"] == "gptq" and "pickled" in found["weights_problem"]
    assert "quantised (gptq)" in hipp("doctor", tmp_path / "copy", *CPU)
    file.write_text(json.dumps(config | {"num_hidden_layers": "three"}))
    with pytest.raises(CheckpointError, match="incomplete or damaged"):
        hipp("doctor", tmp_path / "copy", *CPU)


def test_options_are_checked(llama):
    with pytest.raises(HippError, match="--dtype int8: expected float32"):
        hipp("doctor", llama, "--dtype", "int8")
    with pytest.raises(CheckpointError, match="device 'nonsense' cannot be used here"):
        hipp("doctor", llama, "--device", "nonsense")


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """Conversations about pictures, a text, and three rows that cannot be used."""
    folder = tmp_path_factory.mktemp("chats")
    rows: list = [{"text": "there is a cup on the table and a plate beside it"}]
    for number in range(3):
        Image.new("RGB", (40, 40), (60 * number, 9, 9)).save(folder / f"{number}.png")
        asked = [{"from": "human", "value": "<image>is there a cup " + "there " * number}]
        answer = [{"from": "gpt", "value": "yes"}] if number else []
        rows.append({"image": f"{number}.png", "conversations": asked + answer})
    rows.append({"image": "gone.png", "conversations": asked})
    rows += [{"something": "else"}, {"messages": "hello"}]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "chats.jsonl"


def test_a_calibration_file_is_surveyed_as_it_will_be_read(chats):
    found = hipp_json("doctor", "testbed", *CPU, "--calibration", chats)
    (one,) = found["calibration"]
    with pytest.warns(UserWarning, match="3 of 7 rows"):
        read = Calibration.from_file(chats, AutoProcessor.from_pretrained(WEIGHTS))
    tokens = [int(n) for b in read.batches for n in b["attention_mask"].sum(1)]
    assert (one["rows"], one["usable"], one["problem"]) == (7, read.rows, None)
    assert (one["tokens"], one["longest"]) == (sum(tokens), max(tokens))
    assert [f"{chats}, {line}" for line in one["left_out"]] == list(read.skipped)
    assert [line.partition(":")[0] for line in one["left_out"]] == ["row 5", "row 6", "row 7"]
    assert (one["pictures"], one["unread_pictures"]) == (3, 1)
    assert one["kinds"] == {
        "chats with pictures": 2,
        "texts": 1,
        "chats with pictures, unanswered": 1,
    }
    assert (found["rows"], found["tokens"]) == (4, -(-sum(tokens) // 4))
    told = hipp("doctor", "testbed", *CPU, "--calibration", chats, "--rows", "3")
    assert "calibration: 2 of 3 rows" in told and "can be used (7 in the file)" in told
    assert "rows whose pictures are missing or damaged: 1" in told
    assert told.splitlines()[-1] == f"next: hipp plan testbed --calibration {chats} -o plan.json"


def test_a_file_that_cannot_calibrate_says_why(chats, tmp_path, llama):
    place = save_language_model(tmp_path)
    told = hipp("doctor", place / "llama", *CPU, "--calibration", place / "chats.jsonl")
    assert "tokenizer: " in told and "processor: " not in told
    assert "calibration: 8 of 9 rows" in told and "8 chats without pictures; " in told
    pictured = ("--calibration", chats, "--json")
    (one,) = json.loads(hipp("doctor", place / "llama", *CPU, *pictured))["calibration"]
    assert one["usable"] == 1 and "row 2: it has a picture, and " in one["left_out"][0]
    (tmp_path / "bad.tsv").write_text("index\tanswer\n0\tyes\n")
    for folder, file, why in (
        (llama, place / "chats.jsonl", "has no processor or tokenizer"),
        (place / "llama", tmp_path / "bad.tsv", "has the column question"),
        (place / "llama", tmp_path / "llama", "is no folder that `datasets` saved"),
    ):
        told = " ".join(hipp("doctor", folder, *CPU, "--calibration", file).split())
        assert f"{file} cannot be used: " in told and why in told and "estimates for 128" in told
    with pytest.raises(DataError, match="There is no file nowhere"):
        hipp("doctor", "testbed", "--calibration", "nowhere.jsonl")
    with pytest.raises(CalibrationError, match="are for --calibration FILE"):
        hipp("doctor", "testbed", "--sequence-length", "64")


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_flops_are_those_of_a_forward_pass(name):
    model = build(name)
    model.set_attn_implementation("eager")  # whose products the counter sees
    row = batch(name, size=1, length=61)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**row)
    counted = forward_flops(model, row["input_ids"].shape[1])
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_passes_by_effort():
    model = build("llama")
    groups = find_groups(model)
    fisher, anchored, measured = (
        forward_passes(groups, 3, effort) for effort in ("fisher", "anchored", "measured")
    )
    assert fisher == 3 and fisher < anchored <= fisher + 7.5
    # A point costs two thirds of a pass on average in a tower of three layers.
    points = len(points_at(groups, MEASURED_LEVELS))
    assert measured == pytest.approx(fisher + 1 + points * 2 / 3)


def test_pictures_count_as_tokens():
    assert row_tokens(load_pruned(WEIGHTS), 100) == 100 + 25
    assert row_tokens(build("llama"), 100) == 100


def test_numbers_in_words():
    assert [count(n) for n in (17, 1_500, 134_515_008, 7.06e9)] == ["17", "1.5k", "135M", "7.06B"]
    assert [size(n) for n in (3 << 20, 3 << 30)] == ["3 MiB", "3 GiB"]
    seconds = (0.2, 100, 200, 10_000, 1e6, 1e9)
    assert [duration(s) for s in seconds] == ["1 s", "100 s", "3 min", "3 h", "12 days", "32 years"]
