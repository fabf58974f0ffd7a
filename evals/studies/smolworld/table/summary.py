"""Rows of the study -> the table: rates, and differences from dense and from uniform."""

from collections.abc import Mapping, Sequence
from typing import Any

from hipp_ext.evals.studies.measuring import mean_and_se
from hipp_ext.evals.studies.smolworld.table.asked import Asked
from hipp_ext.evals.studies.smolworld.table.cells import DENSE, Cell
from hipp_ext.evals.studies.smolworld.table.methods import IN_TABLE, UNIFORM
from hipp_ext.evals.studies.smolworld.table.rates import Measured, Rates, Term

# Rates whose differences are told.
CHIEF_RATES = (
    "POPE accuracy overall",
    "POPE F1 overall",
    "POPE F1 adversarial",
    "POPE false yes overall",
    "CHAIR_i",
    "choice",
    "choice with picture",
    "loss",
)
Row = Mapping[str, Any]


def summarize(rows: Mapping[str, Row], asked: Asked, *, resamples: int = 1000) -> dict[str, Any]:
    """The table as JSON values; only plain models, without variants.

    Args:
        rows: of `TableStudy.rows`.
        asked: the questions of the test.
        resamples: of the bootstrap.
    """
    rates = Rates(asked, resamples=resamples)
    seeds: dict[Cell, list[Row]] = {}  # by the cell of seed 0
    for row in rows.values():
        cell = Cell(**row["cell"] | {"seed": 0})
        if cell.variant == "plain" and cell.method in (DENSE, *IN_TABLE):
            seeds.setdefault(cell, []).append(row)
    dense = seeds.pop(Cell(), [])
    table = []
    for cell in sorted(seeds, key=_order):
        own = seeds[cell]
        uniform = Cell(method=UNIFORM, ratio=cell.ratio, repair=cell.repair)
        others = {
            "minus dense": dense,
            "minus uniform": seeds.get(uniform, []) if cell != uniform else [],
        }
        entry = {
            "method": cell.method,
            "corner": cell.corner,
            "ratio": cell.ratio,
            "repair": cell.repair,
            "seeds": len(own),
            "removed": round(float(own[0]["pruning_ratio"]), 4),
            "parameters": own[0]["parameters"],
            "rates": _shown(rates.contrast(_mean(own))),
            **{
                name: _shown(rates.contrast(_difference(own, other)), CHIEF_RATES)
                for name, other in others.items()
                if other
            },
        }
        if len(own) > 1:
            entry["over seeds"] = _over_seeds(rates, own)
        table.append(entry)
    return {
        "dense": _shown(rates.contrast(_mean(dense))) if dense else {},
        "parameters of dense": dense[0]["parameters"] if dense else None,
        "cells": table,
    }


def _order(cell: Cell) -> tuple:
    return cell.repair, cell.ratio, IN_TABLE.index(cell.method), cell.corner


def _mean(rows: Sequence[Row], sign: float = 1.0) -> list[Term]:
    return [(sign / len(rows), row["values"]) for row in rows]


def _difference(rows: Sequence[Row], others: Sequence[Row]) -> list[Term]:
    return [*_mean(rows), *_mean(others, -1.0)]


def _shown(measured: Mapping[str, Measured], names: Sequence[str] = ()) -> dict[str, list[float]]:
    return {
        name: [round(own.value, 3), round(own.se, 3)]
        for name, own in measured.items()
        if not names or name in names
    }


def _over_seeds(rates: Rates, rows: Sequence[Row]) -> dict[str, Any]:
    """Mean and standard error over seeds, whatever the questions."""
    each = [rates.contrast([(1.0, row["values"])]) for row in rows]
    return {name: mean_and_se([own[name].value for own in each]) for name in CHIEF_RATES}
