"""Plan -> pruned model -> its answers: repairs, torch-pruning's own pruner, and variants."""

import copy
from pathlib import Path
from typing import Any

from hipp_ext.evals.studies.smolworld.table.bench import Bench
from hipp_ext.evals.studies.smolworld.table.cells import Cell
from hipp_ext.evals.studies.smolworld.table.methods import METHODS
from hipp_ext.evals.studies.smolworld.table.recovering import recovered
from hipp_ext.evals.studies.smolworld.table.variants import half_of_the_picture, quantised
from hipp_ext.plan import PruningPlan
from hipp_ext.surgery.prune import prune


def examined(bench: Bench, cell: Cell, plan: PruningPlan | None, folder: Path) -> dict[str, Any]:
    """What is measured of a cell: its answers ("values") and its number of "parameters".

    Args:
        bench: the model and its questions.
        cell: the cell.
        plan: its plan; None: it is dense.
        folder: folder of a recovery that goes on if interrupted.
    """
    model = made(bench, cell, plan, folder)
    size = sum(p.numel() for p in model.parameters())
    if cell.variant == "half of the picture":
        own = bench.fast(model)
        with half_of_the_picture(own, bench.processor) as processor:
            values = bench.examine(own, anew=True, processor=processor)
    else:
        if cell.variant == "W8A8":
            model = quantised(copy.deepcopy(model).to(bench.dtype))
        values = bench.examine(model, anew=cell.repair == "distil")
    return {"parameters": size, "values": values}


def made(bench: Bench, cell: Cell, plan: PruningPlan | None, folder: Path) -> Any:
    """The model of a cell, but for its variant."""
    if plan is None:
        return bench.dense
    method = METHODS[cell.method]
    if method.host and cell.repair == "none":
        from hipp_ext.integrations.torch_pruning import PlanPruner

        model = copy.deepcopy(bench.dense)
        PlanPruner(model, plan=plan).step()
        return model
    fit = cell.repair != "none" and method.reconstructs
    model = prune(bench.dense, plan, reconstruct=fit, calibration=bench.calibration)
    if cell.repair == "distil":
        bench.log(f"recovery: {cell.title}")
        model = recovered(bench, model, folder)
    return model
