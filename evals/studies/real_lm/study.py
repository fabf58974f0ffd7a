"""Runs the comparison: one file per plan and per measured model, so that a killed run resumes."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hipp_ext.budget import check_ratio
from hipp_ext.errors import DataError
from hipp_ext.evals.studies.real_lm.flap_bias import prune_with_bias
from hipp_ext.evals.studies.real_lm.jobs import Job, sides_of
from hipp_ext.evals.studies.real_lm.methods import METHODS, make_plans
from hipp_ext.evals.studies.real_lm.stock_pruner import prune_stock, removed
from hipp_ext.evals.studies.real_lm.text import Corpus, row_losses
from hipp_ext.files import write_atomic
from hipp_ext.groups import find_groups, total_parameters
from hipp_ext.plan import PruningPlan
from hipp_ext.progress import progress_bar
from hipp_ext.runs import RunFolder
from hipp_ext.surgery.prune import prune

RATIOS = (0.1, 0.2, 0.3, 0.4)


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared, on what.

    Args:
        model: a language model.
        corpus: calibrations and test.
        folder: folder of finished jobs, or of a new run.
        methods: keys of METHODS.
        ratios: pruning_ratios.
        draws: number of draws of the calibration; draw i has seed i.
        model_name: says which model the folder belongs to.
    """

    model: nn.Module
    corpus: Corpus
    folder: Path
    methods: Sequence[str] = tuple(METHODS)
    ratios: Sequence[float] = RATIOS
    draws: int = 3
    model_name: str = "SmolLM2-135M-Instruct Q4_1"

    def __post_init__(self) -> None:
        if unknown := set(self.methods) - set(METHODS):
            raise DataError(f"No method is called {sorted(unknown)}; there are {list(METHODS)}.")
        for ratio in self.ratios:
            check_ratio(ratio)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to go on in the folder."""
        return {
            "model": self.model_name,
            "text": self.corpus.digest,
            "size": asdict(self.corpus.size),
        }

    def jobs(self) -> list[Job]:
        """All jobs, those of one draw after those of another: a short run is a whole picture."""
        return [
            Job(method=method, draw=draw, ratio=ratio, side=side)
            for draw in range(self.draws)
            for method in self.methods
            for ratio in self.ratios
            for side in sides_of(method, draw)
        ]

    def run(self, *, show: bool = True) -> Iterator[list[dict[str, Any]]]:
        """Run what the folder lacks; yields the rows there are, at first and after every job.

        The first row is the dense model's.
        """
        jobs = self.jobs()
        with RunFolder(self.folder, self.identity) as folder:
            rows = {job.name: row for job in jobs if (row := _read(folder / f"{job.name}.json"))}
            dense = self._dense(folder)
            yield [dense, *rows.values()]
            missing = [job for job in jobs if job.name not in rows]
            first = len(jobs) - len(missing)
            with progress_bar(show, "pruned models", len(jobs), first) as update:
                for done, job in enumerate(missing, first):
                    update(done, f"{job.method} {job.ratio:.0%}, draw {job.draw}, {job.side}")
                    row = self._job(folder, job)
                    write_atomic(folder / f"{job.name}.json", json.dumps(row))
                    rows[job.name] = row
                    update(done + 1, "")
                    yield [dense, *rows.values()]

    def _dense(self, folder: RunFolder) -> dict[str, Any]:
        if (row := _read(folder / "dense.json")) is None:
            row = {"method": "dense", "losses": row_losses(self.model, self.corpus.test).tolist()}
            write_atomic(folder / "dense.json", json.dumps(row))
        return row

    def _job(self, folder: RunFolder, job: Job) -> dict[str, Any]:
        """Method, ratio, draw and side, what was removed, the test's losses, and the cost."""
        row: dict[str, Any] = asdict(job)
        start = time.perf_counter()
        if METHODS[job.method].make is None:
            small = prune_stock(self.model, job.ratio)
            row |= {"removed": removed(self.model, small), "passes": 0.0}
            row["seconds"] = time.perf_counter() - start
        else:
            plan = self._plan(folder, job)
            calibration = self.corpus.calibration(job.draw)
            start = time.perf_counter()
            small = (
                prune_with_bias(self.model, plan, calibration)
                if METHODS[job.method].bias
                else prune(
                    self.model,
                    plan,
                    reconstruct=job.side == "reconstructed",
                    calibration=calibration,
                )
            )
            row["surgery_seconds"] = time.perf_counter() - start
            row |= {"removed": self._removed(plan), **plan.notes}
        row["losses"] = row_losses(small, self.corpus.test).tolist()
        return row

    def _removed(self, plan: PruningPlan) -> float:
        """Removed parameters over those of all KV groups and FFN channels, whatever the unit."""
        total = total_parameters(find_groups(self.model))
        removed = sum((g.width - g.keep) * g.unit_parameters for g in plan.groups)
        return removed / total

    def _plan(self, folder: RunFolder, job: Job) -> PruningPlan:
        """The plan of a job; where its file is missing, the plans of all ratios are made."""
        file = folder / f"{job.plan_name}.json"
        if not file.exists():
            make = METHODS[job.method].make
            assert make is not None
            calibration = self.corpus.calibration(job.plan_draw)
            torch.manual_seed(job.plan_draw)
            plans = make_plans(make, self.model, calibration, self.ratios)
            for ratio, plan in plans.items():
                of_ratio = replace(job, ratio=ratio)
                plan.save(folder / f"{of_ratio.plan_name}.json", overwrite=True)
        return PruningPlan.load(file)


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.exists() else None
