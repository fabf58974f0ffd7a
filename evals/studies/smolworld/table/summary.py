"""Rows of the study -> the table: rates, and differences from dense and from uniform."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hipp_ext.evals.studies.measuring import mean_and_se
from hipp_ext.evals.studies.smolworld.table.asked import Asked
from hipp_ext.evals.studies.smolworld.table.cells import DENSE
from hipp_ext.evals.studies.smolworld.table.methods import METHODS, UNIFORM
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


@dataclass(frozen=True)
class Place:
    """What the seeds of a cell have in common."""

    method: str
    corner: str
    ratio: float
    repair: str
    variant: str

    @classmethod
    def of(cls, row: Row) -> "Place":
        """The place of a row of the study."""
        return cls(**{k: v for k, v in row["cell"].items() if k != "seed"})


def summarize(rows: Mapping[str, Row], asked: Asked, *, resamples: int = 1000) -> dict[str, Any]:
    """The table as JSON values; only plain models, without variants.

    Args:
        rows: of `TableStudy.rows`.
        asked: the questions of the test.
        resamples: of the bootstrap.
    """
    rates = Rates(asked, resamples=resamples)
    places: dict[Place, list[Row]] = {}
    for row in rows.values():
        place = Place.of(row)
        if place.variant == "plain" and (place.method == DENSE or METHODS[place.method].in_table):
            places.setdefault(place, []).append(row)
    dense = [row for place, own in places.items() if place.method == DENSE for row in own]
    table = []
    for place in sorted(places, key=_order):
        if place.method == DENSE:
            continue
        own = places[place]
        uniform = places.get(Place(UNIFORM, "middle", place.ratio, place.repair, "plain"), [])
        others = {"minus dense": dense, "minus uniform": uniform if place.method != UNIFORM else []}
        entry = {
            "method": place.method,
            "corner": place.corner,
            "ratio": place.ratio,
            "repair": place.repair,
            "seeds": len(own),
            "removed": round(float(own[0]["pruning_ratio"]), 4),
            "parameters": own[0]["parameters"],
            "seconds of planning": round(max(row["planned"] for row in own), 1),
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


def _order(place: Place) -> tuple:
    methods = [DENSE, *METHODS]
    return place.repair, place.ratio, methods.index(place.method), place.corner


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
