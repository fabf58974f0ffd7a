"""VLMEvalKit's flags, and its files where its users look for them."""

import json
import re
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from vlm_tables import save_llava

from hipp_ext.evals.hipp_vlm import HippVLM
from hipp_ext.evals.runs import read_runs
from hipp_ext.integrations import vlmevalkit_flags as flags
from hipp_ext.integrations.vlmevalkit import _import_vlmeval, evaluate, main, register

QUIET = {"device": "cpu", "progress": False}
POPE = {"tiny_POPE.xlsx", "tiny_POPE_auxmatch.xlsx", "tiny_POPE_score.csv"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"status.json"}


def read(path: Path) -> pd.DataFrame:
    if path.suffix == ".xlsx":
        return pd.read_excel(path)
    if path.suffix == ".json":
        return pd.read_json(path)
    return pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",")


def command(model: Path, lmu: Path, work: Path, *more: str) -> list[str]:
    start = ["--data", "POPE", "--model", str(model), "--lmu-data", str(lmu), "--device", "cpu"]
    return [*start, "--work-dir", str(work), *more]


@pytest.mark.parametrize("formats", [{}, {"PRED_FORMAT": "tsv"}])
def test_the_files_are_those_of_vlmevalkits_own_run(llava, lmu, tmp_path, monkeypatch, formats):
    """VLMEvalKit's run.py, with its command line, on the same model."""
    for variable, value in {"LMUData": str(lmu), **formats}.items():
        monkeypatch.setenv(variable, value)
    data = ["--data", "POPE", "ScienceQA_TEST", "--model"]
    assert main([*data, str(llava), "--work-dir", str(tmp_path / "ours"), "--device", "cpu"]) == 0
    _import_vlmeval()
    register({"tiny": llava})
    from vlmeval import run

    theirs, ours = tmp_path / "theirs", tmp_path / "ours/tiny"
    flags = ["tiny", "--work-dir", str(theirs), "--judge", "exact_matching"]
    monkeypatch.setattr(sys, "argv", ["run.py", *data, *flags])
    monkeypatch.setattr(HippVLM.__init__, "__defaults__", ("cpu", None, 16))
    run.main()
    files = [p for p in (theirs / "tiny").iterdir() if p.is_file() and p.suffix != ".pkl"]
    assert len(files) == 7 and {path.name for path in files} == {p.name for p in ours.iterdir()}
    for path in files:
        if path.name == "status.json":
            continue
        expected, found = read(path), read(ours / path.name)
        keys = [column for column in ("index", "split", "Overall") if column in expected][:1]
        missing = set(expected) ^ set(found)
        assert missing <= {"image_path"}, path.name
        expected, found = (f.sort_values(keys).reset_index(drop=True) for f in (expected, found))
        columns = sorted(set(expected) - missing)
        pd.testing.assert_frame_equal(found[columns], expected[columns], check_dtype=False)
    mine, yours = (json.loads((f / "status.json").read_text()) for f in (ours, theirs / "tiny"))
    for data, entry in yours["datasets"].items():
        for field in ("status", "prediction_file", "judge_model", "primary_metric", "metrics"):
            assert mine["datasets"][data][field] == pytest.approx(entry[field])


def test_files_of_another_model_of_that_name_go(llava, lmu, tmp_path, monkeypatch):
    work = tmp_path / "w"
    evaluate(llava, ["POPE", "ScienceQA"], lmu_data=lmu, work_dir=work, **QUIET)
    (work / "tiny/notes.txt").write_text("the user's own")
    assert len(names(work / "tiny")) == 7
    other = save_llava(tmp_path / "tiny", seed=1)
    (record,) = evaluate(other, "POPE", lmu_data=lmu, work_dir=work, **QUIET)
    assert names(work / "tiny") == {*POPE, "notes.txt"}
    status = json.loads((work / "tiny/status.json").read_text())
    assert status["model_hash"] == record.model_hash and set(status["datasets"]) == {"POPE"}
    monkeypatch.setenv("PRED_FORMAT", "json")
    evaluate(other, "POPE", lmu_data=lmu, work_dir=work, **QUIET)
    assert "tiny_POPE.json" in names(work / "tiny") and len(names(work / "tiny")) == 4


def test_vlmevalkits_own_results_stay(llava, lmu, tmp_path):
    """A folder that VLMEvalKit wrote, without a hash of the model."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "tiny_MMBench.xlsx").write_text("theirs")
    (folder / "status.json").write_text('{"datasets": {"MMBench": {"status": "done"}}}')
    evaluate(llava, "POPE", lmu_data=lmu, work_dir=tmp_path, **QUIET)
    assert names(folder) == {*POPE, "tiny_MMBench.xlsx"}
    assert set(json.loads((folder / "status.json").read_text())["datasets"]) == {"MMBench", "POPE"}


DAMAGED = (
    "{",
    "[]",
    '{"datasets": []}',
    '{"datasets": {"POPE": "done"}}',
    '{"model_hash": 1, "datasets": {"../../x": {}, "\\u0000": {}, "x": 5}}',
)


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_status_does_no_harm(llava, lmu, tmp_path, content):
    (tmp_path / "w/tiny").mkdir(parents=True)
    (tmp_path / "w/tiny/status.json").write_text(content)
    (tmp_path / "x.xlsx").write_text("stays")
    evaluate(llava, "POPE", lmu_data=lmu, work_dir=tmp_path / "w", limit=1, **QUIET)
    assert names(tmp_path / "w/tiny") == POPE and (tmp_path / "x.xlsx").exists()


def test_models_of_one_name_have_folders_of_their_own(llava, lmu, tmp_path):
    one, other = shutil.copytree(llava, tmp_path / "a/m"), save_llava(tmp_path / "b/m", seed=1)
    records = evaluate([one, other], "POPE", lmu_data=lmu, work_dir=tmp_path / "w", **QUIET)
    for record in records:
        name = f"m-{record.model_hash[:8]}"
        assert (tmp_path / "w" / name / f"{name}_POPE.xlsx").is_file()
        assert read_runs(tmp_path / "w" / name)["POPE"].answers


def test_infer_then_eval(llava, lmu, tmp_path, capsys, monkeypatch):
    assert main(command(llava, lmu, tmp_path, "--mode", "eval")) == 1
    said = capsys.readouterr().err
    assert "12 questions of POPE are not answered by" in said and not list(tmp_path.glob("tiny*"))
    assert main(command(llava, lmu, tmp_path, "--mode", "infer", "--limit", "5")) == 0
    out = capsys.readouterr().out
    assert "answers in" in out and "F1" not in out
    assert names(tmp_path / "tiny") == {"tiny_POPE.xlsx"}
    assert not list(tmp_path.rglob("results.json"))
    assert main(command(llava, lmu, tmp_path, "--mode", "eval")) == 1
    assert "4 questions of POPE are not answered" in capsys.readouterr().err
    monkeypatch.setattr(HippVLM, "__init__", None)  # no model is loaded
    assert main(command(llava, lmu, tmp_path, "--mode", "eval", "--limit", "5")) == 0
    assert "F1 overall" in capsys.readouterr().out and names(tmp_path / "tiny") == POPE


def test_every_flag_of_vlmevalkit_is_known(capsys, monkeypatch):
    """Followed, without effect, or refused; and those that are refused exist in VLMEvalKit."""
    _import_vlmeval()
    from vlmeval import run

    monkeypatch.setattr(sys, "argv", ["run.py", "--help"])
    with pytest.raises(SystemExit):
        run.parse_args()
    theirs = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.M))
    from hipp_ext.integrations.vlmevalkit_options import parser

    ours = set(parser()._option_string_actions)
    assert len(theirs) == 39 and not theirs - ours
    assert {*flags._REFUSED, *flags._WITHOUT_EFFECT} <= theirs


def test_the_documentation_lists_what_is_refused_and_what_has_no_effect():
    page = (Path(__file__).parents[2] / "docs/vlmevalkit.md").read_text()
    rows = re.findall(r"^\| (.*--.*) \| (accepted, without effect|refused)", page, re.M)
    listed: dict[str, list[str]] = {}
    for cell, what in rows:
        listed.setdefault(what, []).extend(re.findall(r"`(--[a-z-]+)`", cell))
    assert sorted(listed["refused"]) == sorted(flags._REFUSED)
    assert sorted(listed["accepted, without effect"]) == sorted(flags._WITHOUT_EFFECT)


def test_flags_of_vlmevalkit(llava, lmu, tmp_path, capsys):
    known = ["--reuse", "--reuse-aux", "all", "--judge", "exact_matching", "--nproc", "8"]
    known += ["--api-mode", "--judge-retry", "3", "--ignore", "--limit", "1"]
    assert main(command(llava, lmu, tmp_path, *known)) == 0
    said = capsys.readouterr().err
    assert "vlmeval: --reuse-aux has no effect: scores are computed from the answers" in said
    for flag in ("--api-mode", "--judge-retry", "--ignore"):
        assert f"{flag} has no effect: {flags._WITHOUT_EFFECT[flag][1]}\n" in said
    for flag, message in (
        (["--judge", "gpt-4o-mini"], "scoring is by exact matching (--judge exact_matching)"),
        (["--config", "c.json"], "--config of VLMEvalKit is not followed here: name models"),
        (["--key", "S3CRET"], "--api-key-env NAME"),
        (["--temperature", "0.7"], "decoding is greedy"),
        (["--use-vllm"], "vllm serve FOLDER"),
    ):
        assert main(command(llava, lmu, tmp_path, *flag)) == 2
        said = capsys.readouterr().err
        assert message in " ".join(said.split()) and "S3CRET" not in said


def test_unknown_formats_are_refused_first(llava, lmu, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PRED_FORMAT", "pkl")
    assert main(command(llava, lmu, tmp_path)) == 2
    assert "PRED_FORMAT is 'pkl'; it may be one of xlsx, tsv, json" in capsys.readouterr().err


def test_answers_stay_text_in_excel(llava, lmu, tmp_path, monkeypatch):
    odd = ["=1+1", "http://yes", "1.0", "NA", "", "No" + "x" * 40000]
    monkeypatch.setattr(HippVLM, "generate_batch", lambda self, asked: (odd * 2)[: len(asked)])
    evaluate(llava, "POPE", lmu_data=lmu, work_dir=tmp_path, batch_size=12, **QUIET)
    frame = pd.read_excel(tmp_path / "tiny/tiny_POPE.xlsx", keep_default_na=False, dtype=str)
    assert frame["prediction"].tolist()[:5] == odd[:5] and len(frame["prediction"][5]) == 32767
