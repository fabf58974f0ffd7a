"""Two processes fit like one."""

import contextlib
import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
from fitting import BATCHES, EVEN, SETTINGS, Closeness
from models import build

from hipp_ext import HiPPPlanner
from hipp_ext.planner.evaluation import Workers


class Evaluator(Closeness):
    """One that fails on the second process at its third call, if asked to."""

    def __init__(self, model, fails):
        super().__init__(model)
        self.fails = fails

    def __call__(self, model):
        if self.fails and self.calls == 2:
            raise OSError("the picture is gone")
        return super().__call__(model)


def fit(folder: Path, fail: bool = False) -> None:
    """A fit by the processes that the environment names, and what came of it in this one."""
    workers, model = Workers.join(), build("llava")
    planner = HiPPPlanner(EVEN, cache=None)
    evaluator = Evaluator(model, fail and workers.rank == 1)
    fails = fail and workers.leads
    with pytest.raises(OSError, match="is gone") if fails else contextlib.nullcontext():
        result = planner.fit(
            model, evaluator, SETTINGS, folder=folder, calibration=BATCHES, progress=False
        )
        plan = planner.plan(model)
        ends = [len(planner.archive), result.evaluations, plan.keep_counts]
        told = {"calls": evaluator.calls, "ends": ends}
        folder.with_suffix(f".{workers.rank}.json").write_text(json.dumps(told))


def fit_in_two(folder: Path, fail: bool = False) -> list[int | None]:
    """Exit codes of two processes that find each other as those of torchrun do.

    They are forked, so that none of them imports anything.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def worker(rank):
        os.environ.update(place, WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
        fit(folder, fail)

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=worker, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def test_the_archive_is_that_of_one_process(tmp_path):
    fit(tmp_path / "one")
    assert fit_in_two(tmp_path / "two") == [0, 0]
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
    assert fit_in_two(tmp_path / "failed", fail=True)[0] == 0


def test_without_torchrun_nothing_is_initialised():
    import torch.distributed as dist

    workers = Workers.join()
    assert workers.leads and workers.count == 1 and not dist.is_initialized()
    assert workers.share("as it is") == "as it is"
