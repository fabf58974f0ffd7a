"""Runs the cells: a file per model that was measured, so that a killed table goes on."""

import copy
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
from hipp_ext.evals.studies.smolworld.table.methods import METHODS
from hipp_ext.evals.studies.smolworld.table.planning import Plans
from hipp_ext.evals.studies.smolworld.table.recovering import recovered
from hipp_ext.evals.studies.smolworld.table.searching import search_place
from hipp_ext.evals.studies.smolworld.table.variants import half_of_the_picture, quantised
from hipp_ext.evals.studies.smolworld.table.work import PARAMETERS, TOKENS_PER_SECOND, Work
from hipp_ext.files import write_atomic
from hipp_ext.plan import PruningPlan
from hipp_ext.runs import RunFolder
from hipp_ext.surgery.prune import prune

Row = dict[str, Any]


class TableStudy:
    """The cells of a table or of questions, in a folder in which finished ones are kept.

    Args:
        bench: the model, its questions, and what is measured of it once.
        cells: the cells, the dense one first.
        log: called with a line for every finished part.
    """

    def __init__(self, bench: Bench, cells: Sequence[Cell], log: Callable[[str], None]):
        self.bench, self.cells, self.log = bench, list(cells), log
        self.folder = bench.folder
        ratios = {c.ratio for c in cells if c.ratio and not METHODS[c.method].searches}
        self.plans = Plans(bench, self.folder, sorted(ratios))

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
        tokens = sum(Work(self.bench.sizes, self._has).of(self.left()))
        return tokens / TOKENS_PER_SECOND * size / PARAMETERS / 60

    def run(self) -> Iterator[dict[str, Row]]:
        """Measure what is missing; yields all rows by cell's name, at first and after every cell.

        It is to be called inside `locked()`.
        """
        self.about()
        yield self.rows()
        left = self.left()
        work = Work(self.bench.sizes, self._has).of(left)
        begin, done = time.monotonic(), 0.0
        for number, cell in enumerate(left):
            self._measure(cell)
            done += work[number]
            ahead = (time.monotonic() - begin) / done * (sum(work) - done) / 60
            self.log(f"{number + 1} of {len(left)}, about {ahead:.0f} min left: {cell.title}")
            yield self.rows()

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

    def _measure(self, cell: Cell) -> None:
        begin = time.perf_counter()
        row: Row = {"cell": asdict(cell)}
        plan = None
        if cell.ratio:
            plan = self.plans.of(cell)
            row |= {"pruning_ratio": plan.pruning_ratio, "passes": plan.notes.get("passes")}
        row["key"] = _key(plan, cell)
        row["planned"] = time.perf_counter() - begin
        same = [own for own in self.rows().values() if own["key"] == row["key"]]
        if same:  # the same model: it is not asked again
            copied = ("values", "seconds", "parameters", "made")
            row |= {name: same[0][name] for name in copied} | {"same": same[0]["cell"]}
        else:
            row |= self._examined(cell, plan)
        write_atomic(self._file(cell), json.dumps(row))
        shutil.rmtree(self.folder / "training", ignore_errors=True)

    def _examined(self, cell: Cell, plan: PruningPlan | None) -> Row:
        begin = time.perf_counter()
        model = self._model(cell, plan)
        made = {
            "made": time.perf_counter() - begin,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        if cell.variant == "half of the picture":
            own = self.bench.fast(model)
            with half_of_the_picture(own, self.bench.processor) as processor:
                return made | self.bench.examine(own, anew=True, processor=processor)
        if cell.variant == "W8A8":
            model = quantised(copy.deepcopy(model).to(self.bench.dtype))
        return made | self.bench.examine(model, anew=cell.repair == "distil")

    def _model(self, cell: Cell, plan: PruningPlan | None) -> Any:
        """The model of a cell, but for its variant."""
        dense = self.bench.dense
        if plan is None:
            return dense
        method = METHODS[cell.method]
        if method.host and cell.repair == "none":
            from hipp_ext.integrations.torch_pruning import PlanPruner

            model = copy.deepcopy(dense)
            PlanPruner(model, plan=plan).step()
            return model
        fit = cell.repair != "none" and method.reconstructs
        model = prune(dense, plan, reconstruct=fit, calibration=self.bench.calibration)
        if cell.repair == "distil":
            self.log(f"recovery: {cell.title}")
            model = recovered(self.bench, model, self.folder / "training" / cell.name)
        return model

    def _file(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.name}.json"

    def _has(self, name: str) -> bool:
        """Whether a shared piece of work is done, see `Work`."""
        if name == "precision":
            return (self.folder / "precision.json").exists()
        if name == "teacher":
            return (self.folder / "teacher" / "teacher.json").exists()
        if name in ("anchored", "fisher"):
            # The file's name is a digest; one of two belongs to either effort.
            return len(list((self.folder / "signals").glob("*"))) > (name == "fisher")
        if name in METHODS:
            return any(self.plans.file(c).exists() for c in self.cells if c.method == name)
        kind, ratio, seed = name.rsplit(" ", 2)
        owner = next(n for n, m in METHODS.items() if m.search_name == kind)
        cell = Cell(method=owner, ratio=float(ratio), seed=int(seed))
        place = search_place(self.folder / "searches", cell)
        return place.exists() or place.with_suffix(".json").exists()


def _key(plan: PruningPlan | None, cell: Cell) -> str:
    """Equal for cells whose models are the same."""
    groups = repr(plan.groups) if plan else "dense"
    fitted = plan is not None and METHODS[cell.method].reconstructs
    text = f"{groups} {cell.repair} {fitted} {cell.variant}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
