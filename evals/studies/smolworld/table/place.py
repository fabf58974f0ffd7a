"""Where a study is, and what it measures with; it can be opened in several processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hipp_ext.evals.studies.smolworld.scenes import read_world
from hipp_ext.evals.studies.smolworld.table.bench import Bench
from hipp_ext.evals.studies.smolworld.table.cells import Cell
from hipp_ext.evals.studies.smolworld.table.sizes import Sizes
from hipp_ext.evals.studies.smolworld.table.study import TableStudy


@dataclass(frozen=True, kw_only=True)
class Place:
    """What opens a study.

    Attributes:
        model: folder of the model.
        out: folder of the run.
        sizes: how much is measured.
        ratios: an allocator's plans of all these ratios are made at once.
        concepts: concepts of the model's world; None: as many as the committed model's.
    """

    model: Path
    out: Path
    sizes: Sizes
    ratios: tuple[float, ...] = ()
    concepts: int | None = None

    def study(self, cells: Sequence[Cell], threads: int) -> TableStudy:
        """The study of some cells, computed with some CPU threads."""
        torch.set_num_threads(threads)
        bench = Bench(self.model, read_world(self.concepts), self.sizes, self.out, log)
        return TableStudy(bench, cells, self.ratios, log)


def log(line: str) -> None:
    """Print a line at once, also into a file."""
    print(line, flush=True)
