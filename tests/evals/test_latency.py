"""`hipp latency`: fixed numbers of tokens, taken in turns; FLOPs by hand; memory that grows."""

import json
import math
import sys

import pytest
import torch
from command import hipp, hipp_json
from models import build
from safetensors.torch import save_file

from hipp_ext import load_pruned, save_pruned, testbed
from hipp_ext.budget import keep_counts
from hipp_ext.cli import main
from hipp_ext.errors import DataError, PlanError
from hipp_ext.evals.generation import Workload, measure, prefill_gflops, prompts, token_seconds
from hipp_ext.evals.generation_memory import own_extra_mib
from hipp_ext.evals.latency import folders, print_table, run
from hipp_ext.evals.measuring import paired_ratio, resident
from hipp_ext.evals.report.files import read_timing
from hipp_ext.evals.report.made import conditions
from hipp_ext.groups import find_groups
from hipp_ext.scorers import Magnitude
from hipp_ext.testbed import WEIGHTS
from hipp_ext.units import plan_from_counts

QUICK = Workload(tokens=16, new_tokens=4, repeats=3, warmup=1)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    model, _ = testbed.load()
    groups = find_groups(model)
    made = plan_from_counts(groups, keep_counts(groups, None, 0.5), Magnitude()(model))
    file = tmp_path_factory.mktemp("plan") / "half.json"
    made.save(file)
    return file


def llama(layers: int, width: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=2 * width,
            num_attention_heads=4,
            num_hidden_layers=layers,
        )
    ).eval()


def test_every_run_has_as_many_tokens_as_asked():
    """Also where the model would stop: with a head of zeros the end of the text ties with all."""
    model = build("llama").eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    model.generation_config.eos_token_id = 0
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long)}
    times = token_seconds(model, batch, 6)
    assert len(times) == 6 and min(times) > 0


def test_models_take_turns_and_more_work_takes_longer(monkeypatch):
    from hipp_ext.evals import generation

    models, order = {"big": llama(4, 256), "small": llama(1, 64)}, []

    def noted(model, *arguments):
        order.append(next(name for name, own in models.items() if own is model))
        return token_seconds(model, *arguments)

    monkeypatch.setattr(generation, "token_seconds", noted)
    rows = measure(models, Workload(tokens=256, new_tokens=4, repeats=3, warmup=1))
    assert order == ["big", "small"] * 4  # one warm-up turn, three that count
    for row in rows.values():
        for metric in ("prefill_ms", "decode_ms"):
            assert (
                0 < row[metric]["low"] <= row[metric]["median"] <= row[metric]["high"]
                and row[metric]["n"] == 3
            )
    assert rows["small"]["prefill_speedup"]["median"] > 2 and "prefill_speedup" not in rows["big"]
    assert rows["big"]["weights_mib"] == 4 * rows["big"][
        "parameters"
    ] / 2**20 + 4 * 32 / 2**20 * rotary_buffers(models["big"])


def rotary_buffers(model) -> float:
    return sum(b.numel() for b in model.buffers()) / 32


def test_flops_are_those_counted_by_hand():
    tokens, width, layers = 12, 64, 2
    model = llama(layers, width)
    ids = torch.ones(1, tokens, dtype=torch.long)
    linear = (
        2 * tokens * layers * (4 * width**2 + 3 * width * 2 * width)
    )  # attention's four, the FFN's three
    attention = layers * 2 * 2 * tokens * tokens * width  # scores and mixing, all pairs
    head = 2 * width * 64  # of the last token only
    assert prefill_gflops(model, {"input_ids": ids}) * 1e9 == pytest.approx(
        linear + attention + head, rel=0.01
    )


def test_memory_grows_with_the_batch():
    if resident("VmRSS") != resident("VmRSS"):
        pytest.skip("no /proc here")
    few, many = (own_extra_mib(WEIGHTS, Workload(rows=rows, new_tokens=2)) for rows in (1, 256))
    assert many > few + 20 and few >= 0


def test_folders_and_plans(plan, tmp_path):
    made = folders({"dense": WEIGHTS}, [plan], tmp_path)
    assert list(made) == ["dense", "half"] and load_pruned(
        made["half"]
    ).hipp_plan.pruning_ratio == pytest.approx(0.5, abs=0.02)
    with pytest.raises(DataError, match="two models are called half: rename"):
        folders({"half": WEIGHTS}, [plan], tmp_path)
    save_pruned(build("llava"), tmp_path / "other")
    with pytest.raises(PlanError):
        folders({"other": tmp_path / "other"}, [plan], tmp_path / "x")


def test_a_prompt_holds_the_tokens_of_picture_and_question():
    rows, tokens = prompts(testbed.load()[0], Workload(rows=2))["input_ids"].shape
    assert rows == 2 and tokens > 30


def test_a_run_on_folders(plan, tmp_path):
    file, inputs = tmp_path / "latency.json", tmp_path / "inputs.safetensors"
    ids = torch.full((1, 7), 5)
    save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, inputs)
    given = {"inputs": inputs, "device": "cpu", "out": file}
    result = run({"dense": WEIGHTS}, [plan], QUICK, **given)
    assert json.loads(file.read_text()) == result and result["device"].endswith("CPU")
    dense, half = result["models"]["dense"], result["models"]["half"]
    assert (
        half["parameters"] < dense["parameters"]
        and half["prefill_gflops"] < dense["prefill_gflops"]
    )
    for row in (dense, half):
        assert row["extra_mib"] > 0 and row["peak_mib"] == row["weights_mib"] + row["extra_mib"]
        assert row["prompt_tokens"] == 7
    assert half["prefill_speedup"]["n"] == QUICK.repeats


def test_names_and_units_are_printed_as_they_are(capsys):
    """What stands in brackets is no style, and a name does not steer the terminal."""
    spread = {"median": 1.0, "low": 1.0, "high": 1.0}
    row = {
        "parameters": 1,
        "prefill_gflops": 1,
        "prefill_ms": spread,
        "decode_ms": spread,
        "weights_mib": 1,
        "peak_mib": 1,
    }
    load = {"rows": 1, "new_tokens": 2, "repeats": 3}
    print_table(
        {
            "device": "[/b]cpu",
            "threads": 1,
            "load": load,
            "models": {"[/b]a[red]": row, "\x1b[31mz": row},
        }
    )
    said = capsys.readouterr().out
    assert (
        all(text in said for text in ("[/b]cpu", "[/b]a[red]", "[31mz", "first token [ms]"))
        and "\x1b" not in said
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "p.json"], "Missing argument 'MODEL...'"),
        (["nowhere"], "nowhere is not a model folder"),
        (["testbed", "--dtype", "int4"], "expected float32, bfloat16 or float16"),
        (["testbed", "--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["testbed", "-o", "{there}"], "exists"),
        (["a/testbed", "testbed"], "two folders of one name"),
    ],
)
def test_bad_input_of_the_command(arguments, message, tmp_path, monkeypatch, capsys):
    there = tmp_path / "there.json"
    there.write_text("{}")
    monkeypatch.setattr(
        sys, "argv", ["hipp", "latency", *(a.format(there=there) for a in arguments)]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(("n", "skipped"), [(5, None), (6, 0), (9, 1), (15, 3), (25, 7)])
def test_the_interval_of_a_median_ratio(n, skipped):
    """The sign test leaves out as many of the smallest and largest ratios as 95% allow."""
    found = paired_ratio({"a": [float(i) for i in range(n, 0, -1)], "b": [1.0] * n}, "a", "b")
    assert found["median"] == (n + 1) / 2 and (found["least"], found["most"]) == (1, n)
    if skipped is None:
        assert "low" not in found
        return
    assert (found["low"], found["high"]) == (1 + skipped, n - skipped)
    outside = [
        2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n for k in (skipped, skipped + 1)
    ]
    assert outside[0] <= 0.05 < outside[1]


def test_a_quick_look_takes_fewer_runs_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    file = tmp_path / "latency.json"
    told = hipp("latency", "testbed", "--quick", "--device", "cpu", "-o", file)
    load = json.loads(file.read_text())["load"]
    assert load["quick"] and (load["repeats"], load["warmup"], load["new_tokens"]) == (3, 1, 9)
    assert "9 tokens; median (quartiles) of 3 runs; a quick look, not for comparisons" in told
    assert "A quick look, not for comparisons." in conditions(read_timing(file))
    asked = hipp_json("latency", "testbed", "--quick", "--repeats", "2", "--device", "cpu")
    assert asked["load"]["repeats"] == 2 and asked["load"]["new_tokens"] == 9
