"""Differences between measured models, over pictures and over fits."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hipp_ext.evals.studies.smolworld.table.asked import Asked
from hipp_ext.evals.studies.smolworld.table.cells import Cell
from hipp_ext.evals.studies.smolworld.table.rates import RESAMPLES, Measured, Rates

POPE, CHOICE = "POPE accuracy overall", "choice"


class Contrasts:
    """Differences between measured models.

    Args:
        rows: of `TableStudy.rows`.
        asked: the questions of the test.
        seeds: number of fits of a corner.
        resamples: of the bootstrap.
    """

    def __init__(
        self, rows: Mapping[str, Any], asked: Asked, seeds: int, resamples: int = RESAMPLES
    ):
        self._rates, self.seeds = Rates(asked, resamples=resamples), seeds
        self._values = {name: row["values"] for name, row in rows.items()}

    def has(self, cell: Cell) -> bool:
        """Whether a cell was measured."""
        return cell.name in self._values

    def __call__(self, terms: Sequence[tuple[float, Sequence[Cell]]]) -> dict[str, Measured]:
        """The weighted sum of the mean rates of groups of cells."""
        return self._rates.contrast(
            [
                (weight / len(cells), self._values[cell.name])
                for weight, cells in terms
                for cell in cells
            ]
        )

    def minus(self, one: Sequence[Cell], other: Sequence[Cell]) -> dict[str, Measured]:
        """The mean rates of the first cells minus those of the others.

        Where the first ones are several seeds, the spread over the seeds adds to the error.
        """
        whole = self([(1.0, one), (-1.0, other)])
        seeds = len({cell.seed for cell in one})
        if seeds == 1:
            return whole
        pairs = zip(one, other if len(other) == len(one) else list(other) * len(one), strict=True)
        each = [self([(1.0, [a]), (-1.0, [b])]) for a, b in pairs]
        return {
            name: replace(own, se=math.hypot(own.se, _spread([e[name].value for e in each])))
            for name, own in whole.items()
        }


def _spread(values: Sequence[float]) -> float:
    """Standard error of the mean of the values."""
    return statistics.stdev(values) / len(values) ** 0.5
