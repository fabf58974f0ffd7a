"""Runs the cells of a task: a file per measurement, so that a killed study goes on."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hipp_ext.errors import DataError
from hipp_ext.evals.studies.recovery.cells import ARMS, BASE, Cell, start_name
from hipp_ext.evals.studies.recovery.task import Task
from hipp_ext.files import write_atomic
from hipp_ext.runs import RunFolder


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which cells are run.

    Attributes:
        ratios, arms: those of the cells; empty: all.
        seeds: seeds below this one; None: all.
    """

    ratios: Sequence[float] = ()
    arms: Sequence[str] = ()
    seeds: int | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.arms) - set(ARMS):
            raise DataError(f"No arm is called {sorted(unknown)}; there are {list(ARMS)}.")

    def take(self, cell: Cell) -> bool:
        """Whether the cell is run."""
        return (
            (not self.ratios or cell.ratio in self.ratios)
            and (not self.arms or cell.arm in self.arms)
            and (self.seeds is None or cell.seed < self.seeds)
        )


class TaskStudy:
    """The cells of a task, in a folder in which finished ones are kept.

    Args:
        task: the task.
        folder: folder of all that is measured.
        filters: which cells are run. Those that were run before are in the result, too.
        log: called with a line for every finished part.
    """

    def __init__(self, task: Task, folder: Path, filters: Filters, log: Callable[[str], None]):
        self.task, self.folder, self.log = task, folder, log
        self.cells = [cell for cell in task.design.cells() if filters.take(cell)]

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a study to go on."""
        design = asdict(self.task.design)
        names = ("steps", "search_steps", "lrs")
        chosen = {name: design[name] for name in names}
        return {"task": self.task.name, **self.task.identity, **chosen}

    def minutes(self) -> float:
        """What is left takes about this long, by what a step took until now [minutes]."""
        design = self.task.design
        done = [row for row in self._found().values() if "seconds" in row]
        spent = sum(row["seconds"] for row in done) / max(1, sum(row["steps"] for row in done))
        left = [cell for cell in self.cells if not self._file(cell.name).exists()]
        searches = [n for a in {c.arm for c in left} for n in self._trials(a).values()]
        trials = sum(not self._file(name).exists() for name in searches)
        steps = len(left) * design.steps + trials * design.search_steps
        shared = 0 if done else design.shared_minutes
        return shared + steps * (spent or design.step_seconds) / 60

    def run(self) -> Iterator[dict[str, Any]]:
        """Run what is missing; yields what there is, by name, at first and after every cell."""
        with RunFolder(self.folder, self.identity):
            self._kept("dense", lambda: {"values": self.task.measure(self.task.dense())})
            yield self._found()
            for cell in self.cells:
                if not self._file(cell.name).exists():
                    self._start(cell)
                    lr = self._lr(cell.arm)
                    self._kept(cell.name, lambda c=cell, r=lr: self._cell(c, r))
                    yield self._found()

    def _start(self, cell: Cell) -> None:
        start = ARMS[cell.arm].start

        def measure() -> dict[str, Any]:
            return {"values": self.task.measure(self.task.pruned(cell.ratio, start))}

        self._kept(start_name(cell.ratio, start), measure)

    def _lr(self, arm: str) -> float:
        """The learning rate with the least loss on the validation; of distillation, where the
        design has none for the arm.
        """
        arm = arm if arm in self.task.design.lrs else BASE
        names = self._trials(arm)
        if not names:
            return self.task.design.lrs[arm][0]
        found = {lr: self._kept(n, lambda r=lr: self._trial(arm, r)) for lr, n in names.items()}
        return min(found, key=lambda lr: found[lr]["validation"])

    def _trials(self, arm: str) -> dict[float, str]:
        """Learning rate -> name of its trial; empty if there is nothing to choose from."""
        lrs = self.task.design.lrs.get(arm, ())
        return {lr: f"search {arm}, lr {lr:g}" for lr in lrs} if len(lrs) > 1 else {}

    def _trial(self, arm: str, lr: float) -> dict[str, Any]:
        design = self.task.design
        cell = Cell(ratio=next(iter(design.seeds)), arm=arm, seed=0)
        model, row = self._recovered(cell, lr, design.search_steps)
        return row | {"validation": self.task.validate(model)}

    def _cell(self, cell: Cell, lr: float) -> dict[str, Any]:
        model, row = self._recovered(cell, lr, self.task.design.steps)
        values = {"validation": self.task.validate(model), "values": self.task.measure(model)}
        return row | {"cell": asdict(cell)} | values

    def _recovered(self, cell: Cell, lr: float, steps: int) -> tuple[Any, dict[str, Any]]:
        """The model, and what it took. A recovery that was killed goes on from its checkpoint; its
        seconds are those since then.
        """
        folder = self.folder / "training" / f"{cell.name}, lr {lr:g}, {steps} steps"
        folder.parent.mkdir(exist_ok=True)
        begin = time.perf_counter()
        model, facts = self.task.recovered(
            cell.ratio, ARMS[cell.arm], lr=lr, steps=steps, seed=cell.seed, folder=folder
        )
        seconds = time.perf_counter() - begin
        return model, {"lr": lr, "steps": steps, "seconds": seconds, **facts}

    def _kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` returns, or returned before."""
        file = self._file(name)
        if not file.exists():
            write_atomic(file, json.dumps(make()))
            shutil.rmtree(self.folder / "training", ignore_errors=True)
            self.log(f"{self.task.name}: {name}")
        return json.loads(file.read_text())

    def _file(self, name: str) -> Path:
        return self.folder / "cells" / f"{name}.json"

    def _found(self) -> dict[str, Any]:
        files = sorted((self.folder / "cells").glob("*.json"))
        return {file.stem: json.loads(file.read_text()) for file in files}
