"""The command line as a user types it; calls that need no process of their own run in this one."""

import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import hipp as in_process
from models import save_language_model
from plans import random_plan
from safetensors import SafetensorError
from typer.main import get_command

import hipp_ext
from hipp_ext import HiPPPlanner, PruningPlan, load_pruned
from hipp_ext.allocators import ALLOCATORS
from hipp_ext.cli import app, console, main, options
from hipp_ext.errors import HippError, OutputExistsError, WriteError
from hipp_ext.scorers import SCORERS
from hipp_ext.testbed import WEIGHTS

HIPP = [sys.executable, "-m", "hipp_ext"]
ROWS = ("--calibration-rows", "8")  # few, so that measuring signals is quick


def hipp(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"COLUMNS": "160", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*HIPP, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, env=environment
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cli")


def test_fit_plan_prune_from_start_to_end(folder, monkeypatch):
    monkeypatch.chdir(folder)
    told = in_process("fit", "testbed", "-o", "planner", "--steps", "1", "--questions", "12", *ROWS)
    assert "12 plans evaluated" in told and len(HiPPPlanner.load("planner").archive) == 12
    ask = ("-u", "1", "--pruning-ratio", "0.3", *ROWS)  # omitted weights are 0
    told = in_process("plan", "testbed", "--planner", "planner", *ask, "-o", "plan.json")
    assert "removes 30." in told and "language 0" in told and "extrapolated" not in told
    assert PruningPlan.load(folder / "plan.json").preference == (1, 0, 0)
    beyond = ("-u", "1", "--pruning-ratio", "0.7", *ROWS)
    assert "extrapolated" in in_process(
        "plan", "testbed", "--planner", "planner", *beyond, "-o", "beyond.json"
    )
    in_process(
        "plan", "testbed", "--planner", "planner", "--best-evaluated", *ask, "-o", "best.json"
    )
    best = PruningPlan.load(folder / "best.json")
    evaluated = {
        tuple(g.keep for g in f.plan.groups) for f in HiPPPlanner.load(folder / "planner").front()
    }
    assert tuple(g.keep for g in best.groups) in evaluated and best.pruning_ratio >= 0.3 - 1e-6
    in_process("prune", "testbed", "plan.json", "-o", "small")
    small = load_pruned(folder / "small")
    assert (
        small.hipp_plan.groups == PruningPlan.load(folder / "plan.json").groups
        and (folder / "small/tokenizer.json").exists()
    )
    in_process("prune", "testbed", "plan.json", "-o", "fixed", "--reconstruct", "--device", "cpu")
    fixed = load_pruned(folder / "fixed")
    line = console.command_line()
    assert HiPPPlanner.load("planner").history.command == line
    assert PruningPlan.load("plan.json").commands == (line, line)
    assert small.hipp_plan.commands == (line, line, line)
    changed = {
        k.split(".")[-2]
        for k, v in fixed.state_dict().items()
        if not torch.equal(v, small.state_dict()[k])
    }
    assert fixed.hipp_plan.groups == small.hipp_plan.groups and changed == {"o_proj", "down_proj"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "testbed", "-u", "-1"), "a finite number of 0 or more is needed"),
        (("plan", "testbed", "--pruning-ratio", "1.5"), "in [0, 1) is needed"),
        (("plan", "nowhere", "-o", "x.json"), "nowhere is not a model folder"),
        (("plan", "testbed", "--best-evaluated", "-o", "x.json"), "needs a fitted planner"),
        (("plan", "testbed", "--scorer", "best"), "--scorer best: expected one of wanda_sp, flap"),
        (("plan", "testbed", "--allocator", "best"), "--allocator best: expected one of uniform"),
        (("plan", "testbed", "--allocator", "uniform"), "uniform needs --pruning-ratio"),
        (("plan", "testbed", "-u", "1", "--allocator", "owl"), "owl and a preference exclude"),
        (("plan", "testbed", "--planner", "x", "--allocator", "owl"), "owl and --planner exclude"),
        (("plan", "testbed", "--image-folder", "."), "give a file as well"),
        (
            ("plan", "testbed", "--calibration", "utility=a.tsv"),
            "Give --calibration once, or twice as --calibration utility=FILE",
        ),
        (
            ("prune", "testbed", "x.json", "-o", "x", "--calibration", "a.tsv"),
            "are for --reconstruct",
        ),
        (("prune", "testbed", "missing.json", "-o", "x"), "There is no plan at missing.json"),
        (("report", "nowhere"), "nowhere is not a folder"),
        (
            ("recover", "testbed", "-o", "y", "--optimizer", "sgd"),
            "optimizer='sgd': one of muon, adamw",
        ),
        (("fit", "testbed", "-o", "y", "--cost", "nonsense"), "one of parameters, flops"),
        (("fit", "testbed", "-o", "y", "--pope", "a.tsv"), "Give both --pope and --scienceqa"),
        (("fit", "testbed", "-o", ".", "--overwrite"), ". is the working directory"),
        (("fit", "testbed", "-o", "..", "--overwrite"), ".. is the working directory, or holds it"),
    ],
)
def test_bad_input_is_a_clear_line_and_a_hint_and_exit_code_2(
    tmp_path, monkeypatch, capfd, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hipp", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    told = capfd.readouterr().err
    assert end.value.code == 2 and message in " ".join(told.split()) and "Traceback" not in told
    assert len(told.strip().split("\n")) <= 2


def test_bad_input_of_a_process_of_its_own(tmp_path):
    done = hipp("plan", "testbed", "--pruning-ratio", "0.95", "-o", "x.json", cwd=tmp_path)
    assert (
        done.returncode == 2 and "cannot be met" in done.stderr and "Traceback" not in done.stderr
    )
    assert len(done.stderr.strip().split("\n")) <= 2


def test_a_full_disk_is_one_line_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        "argv",
        ["hipp", "prune", "testbed", str(tmp_path / "plan.json"), "-o", str(tmp_path / "out")],
    )
    random_plan(load_pruned(WEIGHTS)).save(tmp_path / "plan.json")
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as end:
            main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = capsys.readouterr().err.strip().split("\n")
    assert end.value.code == 2 and [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert told[-2:] == [
        f"hipp: {tmp_path}/out could not be written: File too large.",
        "  Free some space there, or choose another place, and run it again.",
    ]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(28, "No space left on device", "/data/x"),
            "hipp: No space left on device: /data/x",
        ),
        (
            SafetensorError("Error while serializing: I/O error: ... (os error 122)"),
            "hipp: Disk quota exceeded",
        ),
        (PermissionError(13, "Permission denied", "mine.tsv"), "hipp: Permission denied: mine.tsv"),
        (OSError("Can't load\nthe tokenizer"), "hipp: Can't load the tokenizer"),
        (HippError("two\nlines"), "hipp: two lines"),
        (WriteError("half a character: \ud800"), "hipp: half a character: ?"),
        (torch.OutOfMemoryError("CUDA out of memory"), "hipp: The memory of the device is full."),
        (KeyError("ours"), None),
    ],
)
def test_errors_of_the_system_are_one_line_and_ours_keep_their_traceback(
    monkeypatch, capsys, tmp_path, error, line
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("hipp_ext.cli.plan.require_new_file", fail)
    monkeypatch.setattr(
        sys, "argv", ["hipp", "plan", "testbed", "-u", "1", "-o", f"{tmp_path}/plan.json"]
    )
    with pytest.raises(KeyError if line is None else SystemExit) as end:
        main()
    if line:
        first, *hint = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 2 and first == line and len(hint) < 2


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    """Folder of a tiny Llama with a tokenizer, a chat template, and chats beside it."""
    return save_language_model(tmp_path_factory.mktemp("text"))


def test_a_language_model_is_calibrated_on_the_users_file(language_model, monkeypatch):
    monkeypatch.chdir(language_model)
    by_task = ("--calibration", "utility=chats.jsonl", "--calibration", "robustness=chats.jsonl")
    plan = ("plan", "llama", "--device", "cpu", "-o", "plan.json", "--overwrite")
    for given in (("--calibration", "chats.jsonl"), by_task):
        told = in_process(*plan, *given, "--sequence-length", "64")
        assert "toy world" not in told and told.count("1 of 9 rows") == 1, told
    owl = ("--allocator", "owl", "--pruning-ratio", "0.2", "--calibration", "chats.jsonl")
    assert "removes 2" in in_process(*plan, *owl)
    for more in (owl, ("--pruning-ratio", "0.2", "--calibration", "chats.jsonl")):
        assert "query heads" in in_process(*plan, *more, "--attention-unit", "query")
    prune = ("prune", "llama", "plan.json", "-o", "small", "--device", "cpu", "--overwrite")
    told = in_process(*prune, "--reconstruct", "--calibration", "chats.jsonl")
    assert "toy world" not in told and "removed in total" in told


def test_the_built_in_questions_are_warned_of_once(language_model, monkeypatch):
    monkeypatch.chdir(language_model)
    plan = ("plan", "llama", "--device", "cpu", "-o", "built-in.json", "--overwrite", *ROWS)
    for more in ((), ("--allocator", "owl", "--pruning-ratio", "0.2")):
        told = in_process(*plan, *more)
        assert told.count("hipp: warning: The calibration is on the built-in questions") == 1
        assert "--calibration FILE" in told


def test_version_and_short_help():
    assert in_process("--version") == f"hipp-ext {hipp_ext.__version__}\n"
    for command in ((), ("plan",), ("latency",)):
        assert in_process(*command, "-h") == in_process(*command, "--help")


def test_ctrl_c_says_that_what_is_finished_is_kept(tmp_path, monkeypatch, capfd):
    arguments = ("fit", "testbed", "-o", str(tmp_path / "planner"), "--questions", "12", *ROWS)

    def run():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs may ignore it
        monkeypatch.setattr(sys, "argv", ["hipp", *arguments])
        main()

    # A fork imports nothing.
    running = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    running.start()
    for _ in range(600):
        if (tmp_path / "planner.fit" / "archive.jsonl").exists():
            break
        time.sleep(0.1)
    os.kill(running.pid, signal.SIGINT)
    running.join(60)
    told = capfd.readouterr().err
    assert running.exitcode == 130 and "hipp: interrupted." in told and "to resume" in told


def test_existing_output_is_kept(tmp_path):
    (tmp_path / "plan.json").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists"):
        in_process("plan", "testbed", "--pruning-ratio", "0.1", "-o", tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == "mine"


def test_an_output_that_takes_an_input_with_it_is_refused(tmp_path):
    plan = tmp_path / "runs" / "plan.json"
    plan.parent.mkdir()
    random_plan(load_pruned(WEIGHTS)).save(plan)
    with pytest.raises(OutputExistsError, match=r"runs holds the input .*plan\.json"):
        in_process("prune", "testbed", plan, "-o", tmp_path / "runs", "--overwrite")
    shutil.copytree(WEIGHTS, tmp_path / "runs/dense")
    for command in (("prune", tmp_path / "runs/dense", plan), ("recover", tmp_path / "runs/dense")):
        with pytest.raises(OutputExistsError, match=r"runs holds the input .*dense"):
            in_process(*command, "-o", tmp_path / "runs", "--overwrite")
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["dense", "plan.json"]


@pytest.mark.parametrize("command", [("plan", "testbed", "-o"), ("front", "a", "--picture")])
def test_a_folder_in_the_place_of_a_file_is_said_before_the_work(tmp_path, command):
    with pytest.raises(WriteError, match="is a folder; a file is to be written there"):
        in_process(*command, tmp_path, "--overwrite")


def every_command(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    command = command or get_command(app)
    yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from every_command(below, (*path, name))


@pytest.mark.parametrize("command", every_command(), ids=" ".join)
def test_help_of_every_command_shows_examples_and_explains_every_option(monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "100")
    shown = in_process(*command, "--help")
    is_group = "Usage: " in shown and "COMMAND" in shown
    example = re.search(r"(Example: |^ +• |^ )(hipp|lm_eval) ", shown, re.MULTILINE)
    assert is_group or example or command == ("lm-eval",)  # which shows lm-eval's own help
    assert not re.findall(r"^│ \*? +-.*(?:>|[A-Z]|\])  +│$", shown, re.MULTILINE)
    assert len(shown.splitlines()) <= 90


def test_help_lists_every_scorer_and_allocator():
    assert tuple(ALLOCATORS) == options.ALLOCATORS and tuple(SCORERS) == options.SCORERS
    shown = in_process("plan", "--help")
    assert all(name in shown for name in (*SCORERS, *ALLOCATORS))


def test_help_as_a_process_of_its_own(tmp_path):
    done = hipp("--help", cwd=tmp_path)
    assert done.returncode == 0 and "Usage:" in done.stdout


def test_what_llama_cpp_and_vllm_serve_has_widths_of_whole_blocks():
    assert options.read_bounds(None, None, None, "gguf") == {"round_to": 32}
    assert options.read_bounds(64, None, None, "gguf") == {"round_to": 64}
    assert options.read_bounds(None, None, None, "vllm") == {"round_to": 32}
    assert options.read_bounds(None, None, None, "stock") == {"shape": "stock"}
