"""Two processes fit like one."""

import subprocess
import sys
import textwrap
from pathlib import Path

SCRIPT = """
    import sys; sys.path[:0] = [{tests!r}, {tests!r} + "/planner"]
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
    result = planner.fit(model, evaluator, SETTINGS, folder={folder!r}, calibration=BATCHES, progress=False)
    plan = planner.plan(model)
    print("rank", workers.rank, "calls", evaluator.calls, "archive", len(planner.archive), result.evaluations, plan.keep_counts)
"""


def fit(folder: Path, processes: int, fail: bool = False) -> subprocess.CompletedProcess:
    script = folder.with_suffix(".py")
    script.write_text(textwrap.dedent(SCRIPT).format(tests=str(Path(__file__).parents[1]), folder=str(folder), fail=fail))
    start = [sys.executable, "-W", "ignore"]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run([*start, str(script)], capture_output=True, text=True, timeout=240)


def test_the_archive_is_that_of_one_process(tmp_path):
    one, two = fit(tmp_path / "one", 1), fit(tmp_path / "two", 2)
    assert one.returncode == 0 and two.returncode == 0, two.stderr[-3000:]
    assert (tmp_path / "one/archive.jsonl").read_text() == (tmp_path / "two/archive.jsonl").read_text()
    lines = {line.split()[1]: line.split() for line in two.stdout.splitlines() if line.startswith("rank")}
    alone = one.stdout.split()
    calls = {rank: int(words[3]) for rank, words in lines.items()}
    assert calls["1"] > 5 and calls["0"] + calls["1"] == int(alone[3])  # shared out, and nothing done twice
    assert lines["0"][4:] == lines["1"][4:] == alone[4:]  # every process ends with the same planner


def test_an_error_in_a_worker_reaches_the_leader(tmp_path):
    failed = fit(tmp_path / "failed", 2, fail=True)
    assert failed.returncode != 0 and "OSError: the picture is gone" in failed.stderr


def test_without_torchrun_nothing_is_initialised():
    import torch.distributed as dist

    from hipp_ext.planner.evaluation import Workers

    workers = Workers.join()
    assert workers.leads and workers.count == 1 and not dist.is_initialized()
    assert workers.share("as it is") == "as it is"
