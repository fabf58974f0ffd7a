"""`vlmeval --base-url`: a served model gets the scores of its folder."""

import json
from pathlib import Path

import pytest
from served_model import DROP, serving

from hipp_ext.errors import DataError
from hipp_ext.evals.compare import compare
from hipp_ext.evals.runs import read_runs
from hipp_ext.integrations.vlmevalkit import ServedVLM, evaluate, main

QUIET = {"device": "cpu", "progress": False}
DATA = ["POPE", "ScienceQA"]


def command(server, lmu: Path, work: Path, *more: str) -> list[str]:
    start = ["--data", "POPE", "--base-url", server.address, "--lmu-data", str(lmu)]
    return [*start, "--work-dir", str(work), *more]


def test_a_served_model_has_the_scores_of_its_folder(llava, lmu, tmp_path):
    with serving(llava) as server:
        models = [llava, ServedVLM(server.address, parallel=5)]
        done = evaluate(models, DATA, lmu_data=lmu, work_dir=tmp_path, **QUIET)
    for folder, served in zip(done[:2], done[2:], strict=True):
        assert served.metrics == folder.metrics and served.n == folder.n > 5
        assert served.model == "org--tiny" and served.settings["base_url"] == server.address
        mine, theirs = (read_runs(record.predictions)[record.data] for record in (folder, served))
        assert mine.answers == theirs.answers and mine.questions == theirs.questions
        assert len(set(mine.answers)) > 2
    assert len(server.bodies) == 18 and server.together > 1
    differences = compare(tmp_path / "tiny", tmp_path / "org--tiny")
    assert differences


def test_a_stopped_run_asks_only_the_rest(llava, lmu, tmp_path, capsys, caplog):
    with serving(llava) as server:
        server.faults = [None] * 7 + [DROP]
        few = command(server, lmu, tmp_path, "--retry", "0", "--api-nproc", "1")
        assert main(few) == 1
        said = capsys.readouterr().err
        assert f"org/tiny at {server.address}: error: no server answers at" in said
        assert not caplog.text and main(few) == 0 and len(server.bodies) == 8 + 5
        assert f"org/tiny at {server.address}: 7 earlier answers are used again" in caplog.text
        assert main(few) == 0 and len(server.bodies) == 13
        server.rows[0]["root"] = "/models/other"  # the server says that it serves another model
        assert main(few) == 0 and len(server.bodies) == 13 + 12
    assert len(list(tmp_path.glob("org--tiny-*/POPE/results.json"))) == 2


def test_limit_asks_no_more(llava, lmu, tmp_path):
    with serving(llava) as server:
        assert main(command(server, lmu, tmp_path, "--limit", "5")) == 0
    assert len(server.bodies) == 5


def test_the_key_is_in_no_file_and_no_output(llava, lmu, tmp_path, capsys, monkeypatch):
    with serving(llava, key="S3CRET") as server:
        assert main(command(server, lmu, tmp_path)) == 2
        assert "refuses the key, or wants one" in capsys.readouterr().err
        monkeypatch.setenv("MY_KEY", "S3CRET")
        arguments = ("--api-key-env", "MY_KEY", "--model", "org/tiny", "--verbose")
        assert main(command(server, lmu, tmp_path, *arguments)) == 0
        assert server.headers[0]["Authorization"] == "Bearer S3CRET"
        server.key = "changed"
        assert main(command(server, lmu, tmp_path / "b", *arguments)) == 2
    shown = capsys.readouterr()
    assert "S3CRET" not in shown.out + shown.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8 and not any(b"S3CRET" in path.read_bytes() for path in files)
    (results,) = tmp_path.glob("*/POPE/results.json")
    assert "MY_KEY" in json.loads(results.read_text())["command"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "b"], "serves no model b. It serves: org/tiny"),
        (["--device", "cpu"], "--device is for model folders; a server decides that itself"),
        (["--batch-size", "2"], "--batch-size is for model folders"),
        (["--api-key-env", "sk-12"], "what was given is not the name of one"),
        (["--api-nproc", "0"], "0 is not 1 or more"),
        (["--retry", "-1"], "-1 is not 0 or more"),
    ],
)
def test_wrong_input_is_found_before_a_question(lmu, tmp_path, capsys, arguments, message):
    with serving() as server:
        assert main(command(server, lmu, tmp_path, *arguments)) == 2
    said = capsys.readouterr().err
    assert message in said and "sk-12" not in said and not server.bodies


def test_addresses_stand_where_they_belong(llava, lmu, tmp_path, capsys):
    start = ["--data", "POPE", "--lmu-data", str(lmu), "--work-dir", str(tmp_path)]
    assert main([*start, "--model", "http://localhost:8000/v1"]) == 2
    assert "Give it as --base-url" in capsys.readouterr().err
    assert main([*start, "--model", str(llava), "--api-key-env", "X"]) == 2
    assert "--base-url is missing" in capsys.readouterr().err
    assert main(start) == 2
    assert "required: --model (or --base-url, for a server)" in capsys.readouterr().err
    with pytest.raises(DataError, match="ServedVLM"):
        evaluate("https://host/v1", "POPE", lmu_data=lmu, work_dir=tmp_path, **QUIET)


@pytest.mark.parametrize("name", ["..", "a/../b", "x\0y\n", "ü" * 200])
def test_odd_names_stay_in_the_work_folder(llava, lmu, tmp_path, name):
    with serving(llava, names=(name,)) as server:
        models = ServedVLM(server.address)
        (done,) = evaluate(models, "POPE", lmu_data=lmu, work_dir=tmp_path / "w", limit=2, **QUIET)
    assert (tmp_path / "w" / done.model / "status.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"w"}
