"""Models measured in the runtimes that serve them, each in a process of its own."""

import json
from dataclasses import asdict

import pytest
from command import hipp
from llama_cpp_runtime import save
from models import build
from plans import random_plan

from hipp_ext import prune
from hipp_ext.errors import DataError
from hipp_ext.evals.measuring import describe
from hipp_ext.evals.report.files import read_timing
from hipp_ext.evals.runtimes import Serving, blocks, measure_folders
from hipp_ext.evals.runtimes.blocks import measure_blocks
from hipp_ext.evals.studies.serving.picture import picture
from hipp_ext.evals.studies.serving.study import summarize
from hipp_ext.evals.studies.serving.table import section
from hipp_ext.evals.studies.serving.versions import about
from hipp_ext.groups import find_groups
from hipp_ext.latency_table import LatencyTable

QUICK = {"tokens": 24, "new_tokens": 4, "repeats": 1, "rounds": 1}
MODEL = build("llama")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny Llama, dense and pruned."""
    place = tmp_path_factory.mktemp("folders")
    small = prune(MODEL, random_plan(MODEL))
    return {"dense": save(MODEL, place / "dense"), "pruned": save(small, place / "pruned")}


def test_the_command_measures_in_llama_cpp(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("hipp_ext.cli.latency.ROUNDS", 1)  # each costs a process for every model
    options = ["--tokens", "24", "--new-tokens", "4", "--repeats", "2", "--threads", "1"]
    options += ["--runtime", "llama.cpp", "--weights", "f32", "-o", tmp_path / "found.json"]
    monkeypatch.setattr("sys.argv", ["/bin/hipp", "latency", "dense", "pruned"])
    shown = hipp("latency", *folders.values(), *options)
    assert "llama.cpp f32" in shown and "pruned" in shown
    measured = json.loads((tmp_path / "found.json").read_text())
    found, serving = measured["models"], measured["serving"]
    asked = Serving(runtime="llama.cpp", weights="f32", **QUICK | {"repeats": 2})
    assert serving == asdict(asked)
    assert list(found) == ["dense", "pruned"]
    shown_by_report = read_timing(tmp_path / "found.json")
    assert shown_by_report["serving"] == serving
    for name, figures in shown_by_report["models"].items():
        assert figures == {k: v for k, v in found[name].items() if k != "memory_ratio"}
    assert shown_by_report["device"] and shown_by_report["command"] == "hipp latency dense pruned"
    for figures in found.values():
        assert all(len(figures[key]) == 1 for key in ("prefill_ms", "decode_ms", "memory_mib"))
        assert min(*figures["prefill_ms"], *figures["decode_ms"]) > 0
    dense, pruned = found.values()
    speed = dense["decode_ms"][0] / pruned["decode_ms"][0]
    assert pruned["decode_speedup"]["median"] == pytest.approx(speed)
    assert "decode_speedup" not in dense
    # What the study of serving makes of such figures.
    models = {"dense": folders["dense"], "30% free": folders["pruned"]}
    for number, folder in enumerate(models.values()):
        about(folder).write_text(json.dumps({"parameters": 2e6 - number, "perplexity": 16.5}))
    measured["models"] = dict(zip(models, found.values(), strict=True))
    result = describe("the command", summarize(models, {"llama.cpp f32": measured}), "cpu")
    assert "| 30% free | 2.0M | 16.5 | " in section(result) and f"{speed:.2f}x (" in section(result)
    (axis,) = picture(result).axes
    assert axis.get_title() == "llama.cpp f32" and axis.lines[0].get_xdata() == pytest.approx(speed)


def test_blocks_are_measured_in_transformers(folders, tmp_path, monkeypatch):
    """The table is one of this model."""
    monkeypatch.setattr(blocks, "FRACTIONS", (0.5,))  # every width costs a process
    table = measure_blocks(folders["dense"], Serving(**QUICK), show=False)
    groups = find_groups(MODEL)
    table.check(groups)
    dense = table.latency(groups, [g.width for g in groups], "decode")
    assert dense == pytest.approx(table.dense_ms("decode")) and dense > 0
    assert [units for units, _ in table.prefill.blocks["attention"]] == [2, 3]
    assert table.conditions["model"] == "dense" and table.conditions["weights"] == "f32"
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table


def test_layers_that_differ_have_no_table(folders):
    with pytest.raises(DataError, match="measure the dense model"):
        measure_blocks(folders["pruned"], Serving(**QUICK), show=False)


def test_what_fails_in_a_runtime_is_reported(folders):
    (folders["dense"].parent / "empty").mkdir(exist_ok=True)
    with pytest.raises(DataError, match="empty could not be measured in llama.cpp: .*config.json"):
        measure_folders(
            {"empty": folders["dense"].parent / "empty"},
            Serving(runtime="llama.cpp", **QUICK),
            show=False,
        )
    with pytest.raises(DataError, match="could not be measured in vllm: .*hipp-ext.vllm"):
        measure_folders({"dense": folders["dense"]}, Serving(runtime="vllm", **QUICK), show=False)
    with pytest.raises(DataError, match="vllm is measured with f32, bf16, f16"):
        Serving(runtime="vllm", weights="q8_0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runtime", "llama.cpp", "--dtype", "float16"], "see --weights"),
        (["--weights", "q8_0"], "belong to --runtime"),
        (["--per-block", "--runtime", "llama.cpp"], "give its folder alone"),
    ],
)
def test_options_that_do_not_go_together_are_refused(folders, options, message):
    names = [str(folder) for folder in folders.values()]
    with pytest.raises(DataError, match=message):
        hipp("latency", *names, *options)
