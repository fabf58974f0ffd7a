"""Two processes fit like one."""

import json
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

SCRIPT = """
    import json, sys; sys.path[:0] = [{tests!r}, {tests!r} + "/planner"]
    import torch; torch.set_num_threads(1)
    from models import build
    from fitting import BATCHES, EVEN, SETTINGS, Closeness
    from hipp_ext import HiPPPlanner
    from hipp_ext.planner.evaluation import Workers

    class Evaluator(Closeness):
        def __call__(self, model):
            if {fail} and workers.rank == 1 and self.calls == 2:
                raise OSError("the picture is gone")
            return super().__call__(model)

    workers = Workers.join()
    model = build("llava")
    planner = HiPPPlanner(EVEN)
    evaluator = Evaluator(model)
    result = planner.fit(
        model, evaluator, SETTINGS, folder={folder!r}, calibration=BATCHES, progress=False
    )
    plan = planner.plan(model)
    ends = [len(planner.archive), result.evaluations, plan.keep_counts]
    with open({folder!r} + f".{{workers.rank}}.json", "w") as file:  # printed lines may get mixed
        json.dump({{"calls": evaluator.calls, "ends": ends}}, file)
"""


def script_for(folder: Path, fail: bool = False) -> str:
    script = folder.with_suffix(".py")
    script.write_text(
        textwrap.dedent(SCRIPT).format(
            tests=str(Path(__file__).parents[1]), folder=str(folder), fail=fail
        )
    )
    return str(script)


def fit_in_two(folder: Path, fail: bool = False) -> subprocess.CompletedProcess:
    start = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    return subprocess.run(
        [*start, script_for(folder, fail)], capture_output=True, text=True, timeout=240
    )


def test_the_archive_is_that_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script adds to it
    runpy.run_path(script_for(tmp_path / "one"))
    two = fit_in_two(tmp_path / "two")
    assert two.returncode == 0, two.stderr[-3000:]
    assert (tmp_path / "one/archive.jsonl").read_text() == (
        tmp_path / "two/archive.jsonl"
    ).read_text()
    alone, first, second = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one.0", "two.0", "two.1")
    )
    assert (
        second["calls"] > 5 and first["calls"] + second["calls"] == alone["calls"]
    )  # shared out, and nothing done twice
    assert (
        first["ends"] == second["ends"] == alone["ends"]
    )  # every process ends with the same planner


def test_an_error_in_a_worker_reaches_the_leader(tmp_path):
    failed = fit_in_two(tmp_path / "failed", fail=True)
    assert failed.returncode != 0 and "OSError: the picture is gone" in failed.stderr


def test_without_torchrun_nothing_is_initialised():
    import torch.distributed as dist

    from hipp_ext.planner.evaluation import Workers

    workers = Workers.join()
    assert workers.leads and workers.count == 1 and not dist.is_initialized()
    assert workers.share("as it is") == "as it is"
