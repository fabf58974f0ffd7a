"""The whole way once, small: demo, its report, and a second run that finds everything done."""

import json
import re

import pytest

from hipp_ext import PruningPlan, load_pruned
from hipp_ext.evals.demo import PREFERENCES, DemoSize, run_demo
from hipp_ext.evals.generation import Workload
from hipp_ext.evals.report.page import SECTIONS
from hipp_ext.planner.settings import FitSettings

SIZE = DemoSize(
    settings=FitSettings(steps=1, preferences=1, budgets=2, rollouts=2),
    search=12,
    limit=12,
    load=Workload(new_tokens=3, repeats=2, warmup=0),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, few_rows):
    path = tmp_path_factory.mktemp("demo") / "out"
    run_demo(path, SIZE, log=lambda line: None, progress=False)
    return path


def test_every_piece_is_there_and_belongs_together(folder):
    summary = json.loads((folder / "summary.json").read_text())
    assert [e["name"] for e in summary["entries"]] == ["dense", *PREFERENCES]
    for name in PREFERENCES:
        plan = PruningPlan.load(folder / f"plans/{name}.json")
        assert load_pruned(folder / f"models/{name}").hipp_plan == plan and plan.pruning_ratio > 0
    assert len((folder / "fit/archive.jsonl").read_text().splitlines()) == SIZE.settings.evaluations
    for entry in summary["entries"]:
        assert (
            set(entry["records"]) == {"POPE", "ScienceQA_TEST"}
            and entry["records"]["POPE"]["n"] == 12
        )
    assert summary["entries"][0]["parameters"] > summary["entries"][3]["parameters"]


def test_the_report_shows_what_was_made(folder):
    page = (folder / "report.html").read_text()
    # No captions were measured, and the page says so.
    assert re.findall(r'<section id="(\w+)">', page) == [s for s in SECTIONS if s != "captions"]
    assert "<code>hipp chair ./dense, and the others</code>" in page
    verdicts = re.findall(r"<li><i class=\"dot m\d\"></i><b>(\w+)</b>: (\d+)% fewer", page)
    assert [name for name, _ in verdicts] == list(PREFERENCES)
    assert (
        all(name in page for name in ("dense", *PREFERENCES))
        and "vlmeval --data POPE" in page
        and "fit: seed 0" in page
    )
    for picture in ("front", "keep_counts", "pope", "cost"):
        assert (folder / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    measured = json.loads((folder / "latency.json").read_text())["models"]
    assert list(measured) == ["dense", *PREFERENCES]
    assert (
        measured["compression"]["parameters"]
        == json.loads((folder / "summary.json").read_text())["entries"][3]["parameters"]
    )


def test_a_second_run_repeats_nothing(folder):
    kept = [
        *folder.glob("models/*/model.safetensors"),
        *folder.glob("outputs/*/*/run-*/predictions.jsonl"),
        folder / "latency.json",
    ]
    before = {path: path.stat().st_mtime_ns for path in [*kept, folder / "fit/archive.jsonl"]}
    archive = (folder / "fit/archive.jsonl").read_text()
    run_demo(folder, SIZE, log=lambda line: None, progress=False)
    assert (folder / "fit/archive.jsonl").read_text() == archive
    assert len(kept) == 4 + 8 + 1 and all(path.stat().st_mtime_ns == before[path] for path in kept)
