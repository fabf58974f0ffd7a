"""The plan of every cell, kept in a file: its repairs and variants share it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hipp_ext.allocators import Sensitivity
from hipp_ext.evals.studies.real_lm.methods import make_plans
from hipp_ext.evals.studies.smolworld.table.bench import Bench
from hipp_ext.evals.studies.smolworld.table.cells import CORNERS, Cell
from hipp_ext.evals.studies.smolworld.table.methods import METHODS
from hipp_ext.evals.studies.smolworld.table.searching import searched_plan
from hipp_ext.plan import PruningPlan
from hipp_ext.planner import HiPPPlanner
from hipp_ext.sensitivity.efforts import Effort
from hipp_ext.units import plan_from_counts


class Plans:
    """Makes the plans that a folder lacks.

    Args:
        bench: the model and what is measured of it.
        folder: folder of plans, and of fits and searches.
        ratios: an allocator's plans of all these ratios are made at once.
    """

    def __init__(self, bench: Bench, folder: Path, ratios: Sequence[float]):
        self.bench, self.folder, self.ratios = bench, folder, ratios

    def file(self, cell: Cell) -> Path:
        """The file of a cell's plan."""
        return self.folder / "plans" / f"{cell.plan_name}.json"

    def of(self, cell: Cell) -> PruningPlan:
        """The plan of a cell that is not dense."""
        file = self.file(cell)
        if not file.exists():
            for ratio, plan in self._made(cell).items():
                own = self.file(replace(cell, ratio=ratio))
                own.parent.mkdir(parents=True, exist_ok=True)
                plan.save(own, overwrite=True)
        return PruningPlan.load(file)

    def _made(self, cell: Cell) -> dict[float, PruningPlan]:
        method, bench = METHODS[cell.method], self.bench
        if method.searches:
            return {cell.ratio: searched_plan(bench, self.folder / "searches", cell)}
        if method.make is not None:
            bench.log(f"{cell.method}: plans")
            torch.manual_seed(0)
            ratios = sorted({cell.ratio, *self.ratios})
            return make_plans(method.make, bench.dense, bench.calibration, ratios)
        assert method.effort is not None
        if not method.steered:
            return {cell.ratio: self._of_least_loss(cell.ratio, method.effort)}
        planner = HiPPPlanner(CORNERS[cell.corner], pruning_ratio=cell.ratio, cache=None)
        planner.signals = bench.signals(method.effort)
        return {cell.ratio: planner.plan(bench.dense)}

    def _of_least_loss(self, ratio: float, effort: Effort) -> PruningPlan:
        """What `Sensitivity` plans from known signals."""
        signals = self.bench.signals(effort)
        allocator = Sensitivity(pruning_ratio=ratio, effort=effort)
        counts = allocator.keep_counts(signals.groups, signals.scores, signals.sensitivity)
        return plan_from_counts(signals.groups, counts, signals.scores, scorer=signals.scorer)
