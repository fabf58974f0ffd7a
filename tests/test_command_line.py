"""What all commands have in common: order, quiet, verbose, JSON, errors, completion."""

import ast
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from command import hipp, hipp_json, run
from typer.testing import CliRunner

from hipp_ext import load_pruned
from hipp_ext.cli import app, main, output
from hipp_ext.progress import progress_bar

ROOT = Path(__file__).parents[1]
QUICK = ("--allocator", "uniform", "--scorer", "magnitude", "--pruning-ratio", "0.3")
PLAN = ("plan", "testbed", *QUICK, "--device", "cpu", "-o")
# Commands of their own, tables that are asked for, progress, and processes that answer on stdout.
PRINTING = {
    "hipp_ext/progress.py",
    "integrations/lm_eval.py",
    "integrations/lmms_eval.py",
    "integrations/vlmevalkit_cli.py",
    "integrations/vlmevalkit_flags.py",
    "integrations/vlmevalkit_run.py",
    "evals/front.py",
    "evals/runtimes/worker.py",
}


def test_groups_of_commands_stand_in_order_of_use():
    shown = hipp("--help")
    panels = ("Start", "Plan and prune", "Recover", "Evaluate", "Serve", "More")
    places = [shown.index(f"─ {panel} ─") for panel in panels]
    assert places == sorted(places) and shown.index(" plan ") < shown.index(" prune ")
    assert "Exit codes: 0 success" in shown and "130 interrupted" in " ".join(shown.split())


@pytest.mark.parametrize("arguments", [(), ("--help",)], ids=["alone", "help"])
def test_help_fits_80_columns_and_is_no_error(monkeypatch, capsys, arguments):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["hipp", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "Start" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_plan_and_prune_tell_what_comes_next_unless_quiet_or_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        run(*PLAN, "plan.json").stdout.splitlines()[-1]
        == "next: hipp prune testbed plan.json -o pruned"
    )
    assert run(*PLAN, "other.json", "--quiet").stdout == ""
    found = hipp_json(*PLAN, "third.json")
    assert found["next"] == "hipp prune testbed third.json -o pruned"
    assert found["pruning_ratio"] == pytest.approx(0.3, abs=0.01)
    assert found["removed_bytes"] == 4 * found["removed_parameters"]
    Path("texts.jsonl").write_text('{"text": "Is there a cup in the image? No."}\n' * 40)
    with_file = run(*PLAN, "fourth.json", "--calibration", "texts.jsonl").stdout.splitlines()[-1]
    fitted = "hipp prune testbed fourth.json --reconstruct --calibration texts.jsonl -o pruned"
    assert with_file == f"next: {fitted}"
    told = run("prune", "testbed", "plan.json", "-o", "pruned").stdout
    assert told.splitlines()[-1].startswith("next: hipp recover pruned --teacher ")
    found = hipp_json("prune", "testbed", "plan.json", "-o", "again")
    left = sum(p.numel() for p in load_pruned("again").parameters())
    assert found["parameters"] == left < found["parameters_before"]
    assert found["runtimes"]["transformers"] and found["runtimes"]["hipp-ext"] == []
    served = {v["runtime"]: v["reasons"] for v in hipp_json("check-serving", "again")}
    assert served == found["runtimes"]


def test_plan_says_how_long_it_will_take_before_it_measures(tmp_path, monkeypatch):
    def said(*more) -> str:
        rows = ("--calibration-rows", "4", "--device", "cpu", "--overwrite")
        return run("plan", "testbed", *rows, *more, "-o", tmp_path / "plan.json").stderr

    fisher = ("--effort", "fisher", "--cache")
    first = said(*fisher, tmp_path / "a")
    assert "hipp: measuring takes seconds (5 forward passes over 4 rows, " in first
    assert "takes" not in said(*fisher, tmp_path / "a"), "it was measured before"
    monkeypatch.setattr("hipp_ext.cli.plan_estimate.LITTLE", 0.0)
    monkeypatch.setattr("hipp_ext.evals.estimates.ENOUGH", 1e-9)
    assert re.search(
        r"measuring takes about 1 s, by count: 5 forward .* PFLOP, at \S+ TFLOP/s",
        (said(*fisher, tmp_path / "b")),
    )
    for silent in ("--quiet", "--json"):
        assert "takes" not in said(*fisher, tmp_path / silent, silent)
    owl = ("--allocator", "owl", "--pruning-ratio", "0.2")
    assert "by count: 2 forward passes over 4 rows" in said(*owl)


def test_options_of_hipp_stand_before_or_behind_the_command(tmp_path):
    assert run("-q", *PLAN, tmp_path / "a.json").stdout == ""
    assert run(*PLAN, tmp_path / "b.json", "-q").stdout == ""


def test_hosts_log_only_when_asked():
    """Loggers of hosts, warnings for developers, and what hosts read when they are imported."""

    def noise() -> None:
        logging.getLogger("transformers").warning("noise of a host")
        warnings.warn("for developers", FutureWarning, stacklevel=1)
        warnings.warn("for users", UserWarning, stacklevel=1)
        logging.getLogger("hipp_ext.x").debug("detail")
        logging.getLogger("hipp_ext.x").info("remark")

    def said(**how: bool) -> str:
        done = CliRunner().invoke(_command(noise, **how), [])
        assert done.exception is None
        return done.stderr

    level = logging.getLogger("transformers").level
    assert said().splitlines() == ["hipp: warning: for users", "hipp: note: remark"]
    assert said(quiet=True).splitlines() == ["hipp: warning: for users"]
    assert "hipp: note: detail" in said(verbose=True)
    assert logging.getLogger("transformers").level == level
    with output.speaking():
        assert os.environ["TRANSFORMERS_VERBOSITY"]
        assert logging.getLogger("transformers").level == logging.ERROR


def _command(work, **how):
    import typer

    one = typer.Typer()

    @one.command()
    def run_it() -> None:
        with output.speaking(**how):
            work()

    return one


def test_an_error_is_a_short_line_and_what_to_do(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hipp", "doctor", "llava-hf/llava-1.5-7b-hf"])
    with pytest.raises(SystemExit) as end:
        main()
    first, second = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert first == "hipp: llava-hf/llava-1.5-7b-hf is not a model folder: it does not exist."
    assert second.startswith("  If it is a model of the Hugging Face hub, download it first")


@pytest.mark.parametrize(
    ("message", "lines"),
    [
        ("Such a thing. Do that.", ["hipp: Such a thing.", "  Do that."]),
        ("width 0.5. and\nmore", ["hipp: width 0.5. and more"]),
        ("No a.tsv. `hipp data` makes it.", ["hipp: No a.tsv.", "  `hipp data` makes it."]),
    ],
)
def test_sentences_of_an_error(capsys, message, lines):
    output.show_error(message)
    assert capsys.readouterr().err.splitlines() == lines


def test_colour_is_for_terminals_that_want_it(monkeypatch, capsys):
    said = []
    monkeypatch.setattr("typer.secho", lambda line, fg, err: said.append(fg))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    output.warn("x")
    monkeypatch.setenv("NO_COLOR", "1")
    output.warn("x")
    assert said == ["yellow", None]


def test_lines_are_broken_for_terminals_only(monkeypatch):
    line = " ".join(["word"] * 40)
    assert output.fitted(line) == line
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert max(map(len, output.fitted(line).splitlines())) <= 80


def test_bars_are_lines_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr("hipp_ext.progress.FIRST", 0.0)
    monkeypatch.setattr("hipp_ext.progress.EVERY", 0.0)
    for show in (False, True):
        with progress_bar(show, "fit", 6, start=3) as update:
            for done in range(3, 7):
                update(done, "hypervolume 0.4")
    said = capsys.readouterr()
    lines = [f"hipp: fit {n} of 6, about 1 min left; hypervolume 0.4" for n in (4, 5)]
    assert said.err.splitlines() == lines and said.out == ""


def test_the_shell_completes_commands_and_choices():
    def completed(words: str, position: int) -> list[str]:
        asked = {
            "_HIPP_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(position),
        }
        return CliRunner().invoke(app, [], env=asked, prog_name="hipp").stdout.split()

    assert completed("hipp che", 1) == ["check-serving"]
    assert completed("hipp plan --effort ", 3) == ["fisher", "anchored", "measured"]
    assert "--json" in completed("hipp doctor --js", 2)


def test_the_library_prints_nothing():
    printing = set()
    for top in ("hipp_ext", "integrations", "evals"):
        for path in (ROOT / top).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if name.startswith(("hipp_ext/cli/", "evals/studies/")):
                continue
            calls = (
                n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)
            )
            if any(isinstance(call, ast.Name) and call.id == "print" for call in calls):
                printing.add(name)
    assert printing == PRINTING


def test_a_reader_that_stops_reading_is_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "hipp_ext", "--help"], stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert done.returncode == 1 and done.stderr == b""
