"""`hipp bench kill`: a fit killed by SIGKILL at random moments and resumed, against an undisturbed one, byte for byte."""

import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from hipp_ext.evals.bench.measuring import report
from hipp_ext.evals.demo import search_evaluator

from hipp_ext import testbed
from hipp_ext.planner import FitSettings, HiPPPlanner
from hipp_ext.planner.fit_folder import ARCHIVE, CHECKPOINT
from hipp_ext.preference import Preference

SETTINGS = FitSettings(steps=6, imagined=8, candidates=48)
QUESTIONS = 24


def run(kills: int = 50, seed: int = 0, save: bool = False) -> dict[str, Any]:
    """Kill and resume `kills` times; returns and prints the result.

    Raises:
        RuntimeError: this system cannot fork.
    """
    if not hasattr(os, "fork"):
        raise RuntimeError("`hipp bench kill` needs a system that can fork.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # forked processes cannot share a thread pool
    try:
        model, processor = testbed.load()
        planner = HiPPPlanner(Preference(1, 1, 1))
        planner.measure(model, processor=processor)
        evaluator = search_evaluator(model, processor, QUESTIONS)

        def fit(folder: Path) -> int:
            """Start a process that fits, and return its id."""
            if (child := os.fork()) == 0:
                planner.fit(model, evaluator, SETTINGS, folder=folder, progress=False)
                os._exit(0)
            return child

        with tempfile.TemporaryDirectory() as folder:
            values = _study(Path(folder), fit, kills, random.Random(seed))
    finally:
        torch.set_num_threads(threads)
    return report("kill", f"hipp bench kill --kills {kills} --seed {seed}", values, save)


def _study(folder: Path, fit: Any, kills: int, rng: random.Random) -> dict[str, Any]:
    start = time.perf_counter()
    assert os.waitpid(fit(folder / "whole"), 0)[1] == 0
    seconds = time.perf_counter() - start
    expected = {name: (folder / "whole" / name).read_bytes() for name in (ARCHIVE, CHECKPOINT)}
    same, moments = 0, []
    while len(moments) < kills:
        child = fit(folder / "cut")
        moment = rng.uniform(0, seconds)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        if os.WIFSIGNALED(os.waitpid(child, 0)[1]):  # a fit that was faster than its killer says nothing
            finished = os.waitpid(fit(folder / "cut"), 0)[1] == 0
            same += finished and all((folder / "cut" / n).read_bytes() == content for n, content in expected.items())
            moments.append(round(moment, 2))
        shutil.rmtree(folder / "cut")
    return {
        "kills": kills, "same_archive_and_policy": same, "plans": SETTINGS.evaluations, "seconds_undisturbed": seconds,
        "moments": moments,
    }  # fmt: skip
