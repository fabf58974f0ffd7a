"""Loads what a command needs, and says how long it will take."""

from collections.abc import Sequence
from pathlib import Path

import torch

from hipp_ext.evals.studies.smolworld.scenes import read_world
from hipp_ext.evals.studies.smolworld.table.bench import Bench
from hipp_ext.evals.studies.smolworld.table.cells import Cell
from hipp_ext.evals.studies.smolworld.table.sizes import Sizes
from hipp_ext.evals.studies.smolworld.table.study import TableStudy


def start(
    model: Path,
    out: Path,
    sizes: Sizes,
    cells: Sequence[Cell],
    *,
    concepts: int | None = None,
    threads: int = 2,
) -> TableStudy:
    """The study of a command, whose estimate is printed.

    Args:
        model: folder of the model.
        out: folder of the run.
        sizes: how much is measured.
        cells: what is measured.
        concepts: concepts of the model's world; None: all.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    study = TableStudy(Bench(model, read_world(concepts), sizes, out, log), cells, log)
    left = len(study.left())
    log(
        f"{left} of {len(study.cells)} models are left: about {study.minutes():.0f} minutes on two "
        "cores that compute in bfloat16; what is left is told after every model"
    )
    return study


def log(line: str) -> None:
    """Print a line at once, also into a file."""
    print(line, flush=True)
