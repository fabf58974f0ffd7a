"""Every study is a module with help and an example; its result names the command that makes it."""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from hipp_ext.errors import DataError
from hipp_ext.evals.studies import measuring

FOLDER = Path(measuring.__file__).parent
STUDIES = [p for p in sorted(FOLDER.rglob("*.py")) if "\n    run_command(" in p.read_text()]


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: str(p.relative_to(FOLDER)))
def test_a_study_explains_itself(path, monkeypatch):
    name = ".".join(("hipp_ext.evals.studies", *path.relative_to(FOLDER).with_suffix("").parts))
    module, apps = import_module(name), []
    monkeypatch.setattr(measuring.typer.Typer, "__call__", lambda app: apps.append(app))
    measuring.run_command(module.main if hasattr(module, "main") else module.run)
    told = CliRunner().invoke(apps[0], ["--help"], env={"COLUMNS": "200"})
    assert told.exit_code == 0, told.output
    assert f"python -m {name.removesuffix('.__main__')}" in told.output and "--save" in told.output


def test_results_of_studies_that_are_gone_are_gone():
    texts = [path.read_text() for path in FOLDER.rglob("*.py")]
    for file in (FOLDER / "results").glob("*.json"):
        stem = file.stem.partition("_")[0]
        assert any(f'"{stem}' in text for text in texts), file


def test_a_result_names_its_command(monkeypatch, tmp_path):
    program = SimpleNamespace(__spec__=SimpleNamespace(name="hipp_ext.evals.studies.x.__main__"))
    monkeypatch.setitem(sys.modules, "__main__", program)
    monkeypatch.setattr(sys, "argv", ["main.py", "--out", "a b", "--save"])
    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    result = measuring.report("x", {"figure": 1}, True)
    assert result["command"] == "python -m hipp_ext.evals.studies.x --out 'a b'"
    assert json.loads((tmp_path / "x.json").read_text()) == result and result["figure"] == 1


def test_bad_input_of_a_study_ends_with_one_line(monkeypatch, capsys):
    def study() -> None:
        raise DataError("no such set")

    monkeypatch.setattr(sys, "argv", ["study"])
    with pytest.raises(SystemExit) as end:
        measuring.run_command(study)
    assert end.value.code == 2 and capsys.readouterr().err == "DataError: no such set\n"
