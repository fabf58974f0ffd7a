"""Commands that fit, plan and prune are kept where they wrote, and a report shows them."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from command import hipp
from report_folders import record

from hipp_ext import HiPPPlanner, Preference, PruningPlan, load_pruned
from hipp_ext.cli import console
from hipp_ext.evals.report.made import made
from hipp_ext.evals.report.sources import read_sources
from hipp_ext.files import content_hash
from hipp_ext.files.untrusted import MAX_COMMAND

UNIFORM = ("--allocator", "uniform", "--scorer", "magnitude", "--device", "cpu")


def typed(monkeypatch, *words: str) -> None:
    """Run a command as if it was typed in a shell."""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/hipp", *words])
    hipp(*words)


def evaluated(name: str) -> Path:
    """What `vlmeval` leaves of a model."""
    folder = Path(console.model_folder(name))
    file = Path("outputs", name, "POPE", "results.json")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(record(folder.name, model_hash=content_hash(folder))))
    return folder


def test_a_report_shows_how_models_were_fitted_planned_and_pruned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = [
        ("plan", "testbed", *UNIFORM, "--pruning-ratio", "0.3", "-o", "my plan.json"),
        ("prune", "testbed", "my plan.json", "-o", "half"),
        ("plan", "half", *UNIFORM, "--pruning-ratio", "0.2", "-o", "again.json"),
        ("prune", "half", "again.json", "-o", "small"),
    ]
    for words in commands:
        typed(monkeypatch, *words)
    lines = [console.shlex.join(["hipp", *words]) for words in commands]
    assert "'my plan.json'" in lines[0]
    for found, count in ((PruningPlan.load("my plan.json"), 1), (load_pruned("half").hipp_plan, 2)):
        assert list(found.commands) == lines[:count]
    planner = HiPPPlanner(Preference(1, 1, 1))
    planner.history = replace(planner.history, command="hipp fit testbed")
    planner.save("fitted")
    folders = [evaluated("testbed"), evaluated("small")]
    shown = dict(made(read_sources(["outputs", "fitted", *folders])))["Commands"].splitlines()
    assert shown == ["hipp fit testbed", *lines, "vlmeval"]
    small = Path("small/hipp_plan.json")
    PruningPlan.load(small).replace(notes={}).save(small, overwrite=True)
    Path("outputs/small/POPE/results.json").unlink()
    Path("outputs/small/POPE").rmdir()
    Path("outputs/small").rmdir()
    evaluated("small")
    HiPPPlanner(Preference(1, 1, 1)).save("in Python")
    shown = dict(made(read_sources(["outputs", "in Python", *folders])))["Commands"].splitlines()
    assert shown == [
        "vlmeval",
        "(not fitted by a command: in Python)",
        "(not planned and pruned by commands: small)",
    ]


def test_what_no_file_could_hold_is_not_recorded(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hipp", "plan", "half a \udcff.json", "x" * MAX_COMMAND])
    line = console.command_line()
    assert line.startswith("hipp plan 'half a ?.json' xxx") and len(line) == MAX_COMMAND
