"""Rounds of pruning and recovery: what they leave, and that an interruption changes nothing."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import hipp, hipp_json
from plans import random_plan
from recover.test_file_data import lines, texts
from recover.test_recover import weights
from recover.test_training import dense as small_dense
from recover.test_training import tokenizer

from hipp_ext import load_pruned, prune, save_pruned, testbed
from hipp_ext.allocators import GlobalThreshold, Sensitivity
from hipp_ext.errors import BudgetError, CheckpointError, HippError, OutputExistsError
from hipp_ext.groups import find_groups
from hipp_ext.recover import FileData, RecoverSettings, precompute
from hipp_ext.scorers import Magnitude
from hipp_ext.shrink import ShrinkReport, ShrinkSettings, shrink
from hipp_ext.shrink.report import disk_bytes

RECOVER = RecoverSettings(
    steps=4, lr=3e-4, optimizer="adamw", evaluate_every=2, save_every=1, keep="last"
)
SETTINGS = ShrinkSettings(to=0.7, steps=2, recover=RECOVER)
PLANNER = Sensitivity(pruning_ratio=0.0, effort="fisher")


def dense():
    """A model whose layers matter: transformers' initial weights are too small for that."""
    model = small_dense()
    with torch.no_grad():
        for p in (*model.model.layers.parameters(), model.lm_head.weight):
            p.mul_(8)
    return model


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return lines(tmp_path_factory.mktemp("data") / "a.jsonl", texts(60))


def run(file, folder, settings=SETTINGS, model=None, **options) -> ShrinkReport:
    data = FileData(file, tokenizer(), batch_size=4, holdout=0.2)
    model = model or dense()
    options = {"planner": PLANNER, "processor": tokenizer(), "progress": False} | options
    return shrink(model, data, settings, folder=folder, **options)


@pytest.fixture(scope="module")
def whole(file, tmp_path_factory):
    folder, told = tmp_path_factory.mktemp("whole") / "small", list[str]()
    return run(file, folder, log=told.append), folder, told


def size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def test_two_rounds_end_at_the_ratio_and_every_round_leaves_a_model(whole):
    report, folder, told = whole
    assert [r.ratio_asked for r in report.rounds] == pytest.approx([1 - 0.3**0.5, 0.7])
    kept = 0.0
    for r in report.rounds:
        model = load_pruned(folder / r.folder)
        plan = model.hipp_plan
        assert {g.name: g.width for g in plan.groups} == {
            g.name: g.width for g in find_groups(dense())
        }
        assert plan.pruning_ratio == r.ratio >= r.ratio_asked and r.ratio > kept
        # No group could keep one unit more.
        total = sum(g.width * g.unit_parameters for g in plan.groups)
        spare = (r.ratio - r.ratio_asked) * total
        assert all(g.unit_parameters > spare for g in plan.groups if g.keep < g.width)
        assert r.parameters == sum(p.numel() for p in model.parameters())
        assert r.parameters == report.start_parameters - r.ratio * total
        assert (folder / r.folder / "tokenizer.json").exists()
        assert r.before["kl"] > 0.1 and r.step_kept == r.steps == 4 and r.rows == 16
        assert r.minutes.total > r.minutes.recover > 0
        work = folder / f"{r.folder}.work"
        assert (work / "recover" / "recover.png").exists() and (work / "plan.json").exists()
        assert not (work / "pruned").exists() and not list(work.glob("recover/step-*"))
        kept = r.ratio
    assert report.rounds[1].after["kl"] < report.rounds[1].before["kl"]
    assert ShrinkReport.model_validate_json((folder / "shrink.json").read_text()) == report
    assert (folder / "shrink.png").read_bytes()[:4] == b"\x89PNG"
    assert told[0].startswith(f"{folder}: the run takes up to ") and len(told) == 3
    assert told[1].startswith("round 1 of 2: 0.0% -> 45.2% of the prunable parameters removed")
    assert "round 2 of 2: 45." in told[2] and told[2].endswith("min left")


def test_a_complete_run_does_nothing(whole, file):
    report, folder, _ = whole
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*.safetensors")}
    assert run(file, folder) == report
    assert {f: f.stat().st_mtime_ns for f in folder.rglob("*.safetensors")} == before


def killed_at(renames: int, file: Path, folder: Path) -> None:
    """A run that is killed when it is about to give a file or folder its name."""
    left = renames

    def counted(function):
        def rename(*args, **options):
            nonlocal left
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return rename

    os.rename, os.replace = counted(os.rename), counted(os.replace)
    run(file, folder)


def kill_again_and_again(file: str, folder: str) -> None:
    """Runs until one of them is complete. The process that forks must not have run a model."""
    import accelerate  # noqa: F401  # here, once, and not in every run
    import matplotlib.figure  # noqa: F401
    from transformers import AutoProcessor

    AutoProcessor.from_pretrained(testbed.WEIGHTS)
    rng, kills, places = random.Random(0), 0, set[str]()
    while kills < 60:
        process = multiprocessing.get_context("fork").Process(
            target=killed_at, args=(rng.choice((9, 14, 20)), Path(file), Path(folder))
        )
        process.start()
        process.join()
        if not process.exitcode:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        places |= {p.name for p in Path(folder).iterdir()}
    print(json.dumps({"kills": kills, "places": sorted(places)}))


def test_killed_again_and_again_it_ends_with_the_same_weights(whole, file, tmp_path):
    report, folder, _ = whole
    call = f"import shrink.test_shrink as t; t.kill_again_and_again({str(file)!r}, 'small')"
    done = subprocess.run(
        [sys.executable, "-c", call],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= 3 and {"round-1.work", "round-1", "round-2.work"} <= {*found["places"]}
    again = ShrinkReport.model_validate_json((tmp_path / "small/shrink.json").read_text())
    for one, other in zip(report.rounds, again.rounds, strict=True):
        assert one == other.model_copy(update={"minutes": one.minutes})
        models = [load_pruned(place / one.folder) for place in (folder, tmp_path / "small")]
        assert torch.equal(weights(models[0]), weights(models[1]))
        assert models[0].hipp_plan == models[1].hipp_plan


def test_another_run_in_the_folder_is_refused(whole, file):
    _, folder, _ = whole
    for settings, message in (
        (ShrinkSettings(to=0.6, steps=2, recover=RECOVER), r"settings\.to is 0\.7 there, and 0\.6"),
        (ShrinkSettings(to=0.7, steps=3, recover=RECOVER), r"settings\.steps is 2 there, and 3"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(file, folder, settings)
    with pytest.raises(CheckpointError, match=r"planner is Sensitivity.* and GlobalThreshold"):
        run(file, folder, planner=GlobalThreshold(pruning_ratio=0.0))
    with pytest.raises(CheckpointError, match="another run: model is"):
        run(file, folder, model=small_dense())


def test_a_damaged_report(whole, file, tmp_path):
    _, folder, _ = whole
    (tmp_path / "run.json").write_bytes((folder / "run.json").read_bytes())
    content = json.loads((folder / "shrink.json").read_text())
    for damage in ({"rounds": content["rounds"][1:]}, {"to": "half"}):
        (tmp_path / "shrink.json").write_text(json.dumps(content | damage))
        with pytest.raises(CheckpointError, match="is damaged.*Remove it to start again"):
            run(file, tmp_path)


def test_a_model_that_is_pruned_already(file, tmp_path):
    once = prune(dense(), random_plan(dense(), 0.3))
    gone = once.hipp_plan.pruning_ratio
    with pytest.raises(HippError, match=r"pruned already, by 3.*%.*--teacher"):
        run(file, tmp_path / "a", model=once)
    with pytest.raises(BudgetError, match=r"to=0.2: the model has lost 0.3\d+ of its prunable"):
        low = ShrinkSettings(to=0.2, recover=RECOVER)
        run(file, tmp_path / "a", low, model=once, teacher=dense())
    with pytest.raises(BudgetError, match="cannot be met"):
        high = ShrinkSettings(to=0.95, recover=RECOVER)
        run(file, tmp_path / "a", high, model=once, teacher=dense())
    settings = ShrinkSettings(to=0.5, steps=2, recover=RECOVER, only_last=True, last_steps=2)
    rows = FileData(file, tokenizer(), batch_size=4)
    teacher = precompute(dense(), rows, tmp_path / "teacher", top_k=8, processor=tokenizer())
    save_pruned(once, tmp_path / "once", tokenizer())
    place = tmp_path / "once"
    report = run(file, tmp_path / "small", settings, model=place, teacher=teacher, processor=None)
    assert report.start_ratio == gone and [r.steps for r in report.rounds] == [4, 2]
    asked = [r.ratio_asked for r in report.rounds]
    assert asked == pytest.approx([1 - ((1 - gone) * 0.5) ** 0.5, 0.5])
    small = load_pruned(tmp_path / "small/round-2")
    assert small.hipp_plan.pruning_ratio == report.rounds[-1].ratio == pytest.approx(0.5, abs=0.01)
    assert not (tmp_path / "small/round-1").exists()
    units = {g.name: set(g.kept) for g in once.hipp_plan.groups}
    assert all(set(g.kept) <= units[g.name] for g in small.hipp_plan.groups)


def test_ratios():
    assert ShrinkSettings(to=0.5, steps=1).ratios() == (0.5,)
    assert ShrinkSettings(to=0.75, steps=2).ratios() == (0.5, 0.75)
    assert ShrinkSettings(to=0.6, steps=3, spacing="linear").ratios(0.3) == pytest.approx(
        (0.4, 0.5, 0.6)
    )
    left = [1 - r for r in (0.1, *ShrinkSettings(to=0.7, steps=5).ratios(0.1))]
    assert [b / a for a, b in zip(left, left[1:], strict=False)] == pytest.approx(
        [(0.3 / 0.9) ** 0.2] * 5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": 1.0}, r"a number in \[0, 1\)"),
        ({"steps": 0}, "steps=0"),
        ({"last_steps": 0}, "last_steps=0"),
        ({"spacing": "cubic"}, "spacing='cubic': one of geometric, linear"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(HippError, match=message):
        ShrinkSettings(**{"to": 0.5} | options)


def test_disk_use(whole, file, tmp_path, monkeypatch):
    _, folder, told = whole
    said = float(told[0].partition("up to ")[2].split()[0]) * 1e6
    weights_only = sum(f.stat().st_size for f in folder.rglob("model.safetensors"))
    assert weights_only < said < 20 * weights_only
    assert disk_bytes([5, 3, 2], parameter_bytes=2, trained=False, only_last=False) == 2 * 15
    assert disk_bytes([5, 3, 2], parameter_bytes=2, trained=False, only_last=True) == 2 * 13
    assert disk_bytes([5], parameter_bytes=4, trained=True, only_last=False) == 4 * 10 + 36 * 5
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.warns(UserWarning, match="and 0.0 MB of disk are free.*--only-last"):
        one = ShrinkSettings(to=0.2, steps=1, recover=RecoverSettings(steps=1))
        run(
            file,
            tmp_path / "a",
            one,
            planner=GlobalThreshold(pruning_ratio=0.0, scorer=Magnitude()),
        )


def test_the_command(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pruned(dense(), tmp_path / "dense", tokenizer())
    command = (
        "shrink", "dense", "--to", "0.4", "--steps", "2", "--data", file, "-o", "small",
        "--holdout", "0.2", "--recover-steps", "2", "--last-recover-steps", "3", "--lr", "0.01",
        "--optimizer", "adamw", "--batch-size", "4", "--device", "cpu", "--allocator", "flap",
        "--round-to", "2", "--no-reconstruct", "--spacing", "linear",
    )  # fmt: skip
    told = hipp(*command)
    assert "--lr" not in hipp("shrink", "--help")  # explained by `hipp recover --help`
    assert "round-1" in told and "20.0%" in told and "40.0%" in told and "kl: pruned" in told
    assert "can be served by hipp-ext" in told and f"report: small{os.sep}shrink.json" in told
    report = ShrinkReport.model_validate_json(Path("small/shrink.json").read_text())
    assert [r.steps for r in report.rounds] == [2, 3]
    assert all(g.keep % 2 == 0 for g in load_pruned("small/round-2").hipp_plan.groups)
    assert "20.0%" in hipp(*command)
    assert hipp_json(*command) == report.model_dump(mode="json")
    Path("other").mkdir()
    Path("other/file").touch()
    for wrong, error, message in (
        (("-o", "other"), OutputExistsError, "other exists"),
        (("--to", "1.5"), HippError, r"^to=1.5: a number in \[0, 1\)"),
        (("-u", "1"), HippError, "--allocator flap and a preference exclude"),
        (("--effort", "fisher"), HippError, "--allocator flap and --effort exclude"),
        (("--calibration-rows", "8"), HippError, "is for --calibration FILE"),
        (("--teacher-device", "cpu"), HippError, "--teacher-device needs --teacher"),
        (("--local-steps", "2", "--sharding", "fsdp"), HippError, "local_steps=2 needs the whole"),
    ):
        with pytest.raises(error, match=message):
            hipp(*command, *wrong)
