"""Runs a task of the study: a file per timing and per run, so that a killed study goes on."""

import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hipp_ext.evals.studies.links import network, run_workers
from hipp_ext.evals.studies.measuring import mean_and_se
from hipp_ext.evals.studies.slow_links.methods import METHODS, Method
from hipp_ext.evals.studies.slow_links.tasks import Task
from hipp_ext.files import write_atomic
from hipp_ext.runs import RunFolder

WORKER = "hipp_ext.evals.studies.slow_links.worker"
WAYS = ("plain", "lqsgd")
TIMED_STEPS = 8  # of a timing, with an exchange after every second step
LONGEST = 4 * 3600.0  # of a run [s]
EQUAL_BYTES = "equal bytes"
MOST_STEPS = 10_000

Numbers = dict[str, float]


class TaskStudy:
    """One task: timings on both links, then a run for every method, limit and seed.

    Args:
        task: the task.
        folder: folder of the pruned model, the timings and the runs; finished ones are kept.
        log: called with a line for every finished part.
    """

    def __init__(self, task: Task, folder: Path, log: Callable[[str], None]):
        self.task, self.log = task, log
        self.run = RunFolder(folder, asdict(task), owner=True)
        self.pruned = self.run / "pruned"

    def measure(self) -> dict[str, Any]:
        """What was measured; losses in nats per token, times in seconds."""
        task = self.task
        with self.run:
            task.make(self.pruned)
            timed = {
                rate: {way: self._timing(rate, way) for way in ways}
                for rate, ways in task.timed_ways.items()
            }
            step = statistics.median(r["step"] for rows in timed.values() for r in rows.values())
            sent = {way: timed[max(timed)][way]["bytes"] for way in WAYS}
            links = {rate: _exchange_seconds(rate, rows, sent) for rate, rows in timed.items()}
            limits: dict[str, Any] = {}
            for rate, times in task.seconds.items():
                for seconds in times:
                    limits[f"{rate} Mbit/s, {seconds} s"] = self._compare(
                        seconds, step, links[rate], sent, MOST_STEPS
                    )
            budget = METHODS["LQ-SGD"].cost(task.steps, 0.0, sent["lqsgd"])
            limits[EQUAL_BYTES] = self._compare(budget, 0.0, sent, sent, task.steps)
            return {
                "loss before": self._loss(METHODS["LQ-SGD"], 0, 0),
                "step [s]": step,
                "bytes of an exchange": sent,
                "exchange [s]": {f"{rate} Mbit/s": row for rate, row in links.items()},
                "timings": {f"{rate} Mbit/s": rows for rate, rows in timed.items()},
                "limits": limits,
            }

    def _compare(
        self, limit: float, step: float, exchange: Numbers, sent: Numbers, most: int
    ) -> dict[str, Any]:
        """Method -> its result with as many steps as the limit allows."""
        rows = {}
        for name, method in METHODS.items():
            costs = step, exchange[method.sends]
            steps = method.steps_within(limit, most, *costs)
            losses = [self._loss(method, steps, seed) for seed in range(self.task.seeds)]
            rows[name] = {
                "steps": steps,
                "exchanges": method.exchanges(steps),
                "bytes": method.cost(steps, 0.0, sent[method.sends]),
                "cost": method.cost(steps, *costs),
                "loss": mean_and_se(losses),
                "losses": losses,
            }
            self.log(f"{self.task.name}, limit {limit:.3g}, {name}: {steps} steps, loss {losses}")
        return rows

    def _timing(self, rate: int, way: str) -> dict[str, Any]:
        """Seconds of a step without and of an exchange, and bytes of an exchange."""

        def measure() -> dict[str, Any]:
            settings = Method(sends=way, local_steps=2).settings | {"steps": TIMED_STEPS}
            with network(2, rate) as spaces:
                row = self._train(spaces, settings, 0, evaluate=False)
            begins = row["begins"]
            seconds = [b - a for a, b in zip(begins, begins[1:], strict=False)]
            alone, both = seconds[2::2], seconds[1::2]  # the first step warms up
            step = statistics.median(alone)
            stats = row["stats"]
            return {
                "step": step,
                "exchange": statistics.median(both) - step,
                "bytes": stats["bytes_sent"] / stats["exchanges"],
                "seconds": seconds,
            }

        return self._kept(f"timing {rate} {way}", measure)

    def _loss(self, method: Method, steps: int, seed: int) -> float:
        """Loss on the held-out rows after `steps` steps."""

        def train() -> dict[str, Any]:
            settings = method.settings | {"steps": steps} if steps else None
            return self._train([None, None], settings, seed, evaluate=True)

        name = f"{method.name} {steps} {seed}" if steps else "before"
        return self._kept(name, train)["loss"]

    def _train(
        self,
        spaces: Sequence[str | None],
        settings: Mapping[str, Any] | None,
        seed: int,
        evaluate: bool,
    ) -> dict[str, Any]:
        folder = self.run / "training"
        job = {"task": self.task.name, "pruned": str(self.pruned), "folder": str(folder)}
        job |= {"seed": seed, "settings": settings, "evaluate": evaluate}
        shutil.rmtree(folder, ignore_errors=True)
        try:
            printed = run_workers(WORKER, [json.dumps(job)], spaces, LONGEST)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return json.loads(printed.strip().splitlines()[-1])

    def _kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` returns, or returned before."""
        file = self.run / f"{name}.json"
        if not file.exists():
            write_atomic(file, json.dumps(make()))
            self.log(f"{self.task.name}: {name}")
        return json.loads(file.read_text())


def _exchange_seconds(rate: int, rows: Mapping[str, Any], sent: Numbers) -> Numbers:
    """Way to send -> seconds of an exchange: measured, or else by bytes and rate alone."""
    return {
        way: rows[way]["exchange"] if way in rows else 8 * sent[way] / (1e6 * rate) for way in WAYS
    }
