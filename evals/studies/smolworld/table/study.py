"""Runs the cells: a file per model that was measured, so that a killed table goes on."""

import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hipp_ext.evals.studies.smolworld.table.bench import Bench
from hipp_ext.evals.studies.smolworld.table.cells import Cell
from hipp_ext.evals.studies.smolworld.table.making import examined
from hipp_ext.evals.studies.smolworld.table.methods import METHODS
from hipp_ext.evals.studies.smolworld.table.planning import Plans
from hipp_ext.evals.studies.smolworld.table.work import PARAMETERS, TOKENS_PER_SECOND, Work, done
from hipp_ext.files import write_atomic
from hipp_ext.plan import PruningPlan
from hipp_ext.runs import RunFolder

Row = dict[str, Any]
MeasureCells = Callable[[Sequence[Cell]], Iterator[Cell]]


class TableStudy:
    """The cells of a table or of questions, in a folder in which finished ones are kept.

    Args:
        bench: the model, its questions, and what is measured of it once.
        cells: the cells, the dense one first.
        ratios: an allocator's plans of all these ratios are made at once.
        log: called with a line for every finished part.
    """

    def __init__(
        self,
        bench: Bench,
        cells: Sequence[Cell],
        ratios: Sequence[float],
        log: Callable[[str], None],
    ):
        self.bench, self.cells, self.log = bench, list(cells), log
        self.folder = bench.folder
        self.plans = Plans(bench, self.folder, ratios)

    def locked(self) -> RunFolder:
        """The folder of the run, which no other process may write until its end.

        Raises:
            CheckpointError: it holds a run of another model or of other sizes.
        """
        return RunFolder(self.folder, self.bench.identity)

    def left(self) -> list[Cell]:
        """The cells that are not measured yet."""
        return [cell for cell in self.cells if not self._file(cell).exists()]

    def minutes(self) -> float:
        """What is left takes about this long on this machine, by a rate measured elsewhere."""
        size = sum(p.numel() for p in self.bench.dense.parameters())
        tokens = sum(self._work(self.left()))
        return tokens / TOKENS_PER_SECOND * size / PARAMETERS / 60

    def run(self, measured: MeasureCells | None = None) -> Iterator[dict[str, Row]]:
        """Measure what is missing; yields all rows by cell's name, at first and after every cell.

        It is to be called inside `locked()`.

        Args:
            measured: measures cells, and yields each when it is done; None: one after the other.
        """
        self.about()
        yield self.rows()
        left = self.left()
        work = dict(zip(left, self._work(left), strict=True))
        begin, spent = time.monotonic(), 0.0
        for number, cell in enumerate((measured or self._one_by_one)(left), 1):
            spent += work[cell]
            ahead = (time.monotonic() - begin) / spent * (sum(work.values()) - spent) / 60
            self.log(f"{number} of {len(left)}, about {ahead:.0f} min left: {cell.title}")
            yield self.rows()

    def _one_by_one(self, cells: Sequence[Cell]) -> Iterator[Cell]:
        for cell in cells:
            self.measure(cell)
            yield cell

    def about(self) -> dict[str, Any]:
        """What is told beside the cells."""
        return {"precision": self.kept("precision", self.bench.precision)}

    def rows(self) -> dict[str, Row]:
        """What was measured, by cell's name; of the folder's other cells, too."""
        files = sorted((self.folder / "cells").glob("*.json"))
        return {file.stem: json.loads(file.read_text()) for file in files}

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, or returned before: JSON values."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            write_atomic(file, json.dumps(make()))
        return json.loads(file.read_text())

    def planned(self, cell: Cell) -> bool:
        """Whether the plan of a cell is there, or it needs none."""
        return not cell.ratio or self.plans.file(cell).exists()

    def measure(self, cell: Cell) -> None:
        """Plan, prune, repair and ask one model, and keep what it answered."""
        row: Row = {"cell": asdict(cell)}
        plan = None
        if cell.ratio:
            plan = self.plans.of(cell)
            row["pruning_ratio"] = plan.pruning_ratio
        row["key"] = _key(plan, cell)
        same = [own for own in self.rows().values() if own["key"] == row["key"]]
        if same:  # the same model: it is not asked again
            row |= {name: same[0][name] for name in ("values", "parameters")}
            row["same"] = same[0]["cell"]
        else:
            training = self.folder / "training" / cell.name
            row |= examined(self.bench, cell, plan, training)
            shutil.rmtree(training, ignore_errors=True)
        write_atomic(self._file(cell), json.dumps(row))

    def _file(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.name}.json"

    def _work(self, cells: Sequence[Cell]) -> list[float]:
        return Work(self.bench.sizes, functools.partial(done, self.folder)).of(cells)


def _key(plan: PruningPlan | None, cell: Cell) -> str:
    """Equal for cells whose models are the same."""
    groups = repr(plan.groups) if plan else "dense"
    fitted = plan is not None and METHODS[cell.method].reconstructs
    text = f"{groups} {cell.repair} {fitted} {cell.variant}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
