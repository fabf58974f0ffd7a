"""Comparisons as a table for the terminal."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from hipp_ext.evals.pope import RULES
from hipp_ext.evals.statistics import Estimate
from hipp_ext.evals.text_table import FittingTable
from hipp_ext.files.untrusted import shown

_NAMES = ("data", "rule", "split")
_SCORES = ("n", "A", "B", "B - A", "p\n(bootstrap)", "p\n(McNemar)")
_REST = ("only A/B\ncorrect", "F1 B - A", "all right\nB - A", "yes A/B", "n for 1 point")
_WHOLE = len(_NAMES) + len(_SCORES) + _REST.index("all right\nB - A")


def fitting_table(rows: Sequence[Any], level: float) -> FittingTable:
    """The table of some `Comparison`s, whose intervals have the confidence `level`."""
    cells = [_cells(row, rule) for row, rule in _without_repetition(rows)]
    rest = list(_REST)
    if not any(row[_WHOLE] for row in cells):  # only MME and HallusionBench have it
        del rest[_WHOLE - len(_NAMES) - len(_SCORES)]
        cells = [[*row[:_WHOLE], *row[_WHOLE + 1 :]] for row in cells]
    title = f"accuracy in percent; B - A in points, with its {100 * level:g}% interval"
    return FittingTable(title, _NAMES, (_SCORES, rest), cells, "{}, rule: {}")


def _cells(row: Any, rule: str) -> list[str]:
    own = row.paired
    return [
        shown(row.data, 40),
        rule,
        shown(row.split, 20),
        str(own.n),
        f"{own.a:.2f}",
        f"{own.b:.2f}",
        _with_interval(own.difference),
        _p(own.difference.p_value),
        _p(own.mcnemar_p),
        f"{own.only_a}/{own.only_b}",
        "" if row.f1 is None else _with_interval(row.f1),
        "" if row.whole is None else _with_interval(row.whole),
        "" if row.yes_a is None else f"{row.yes_a:.1f}/{row.yes_b:.1f}",
        f"{row.questions_for_a_point:,}",
    ]


def _without_repetition(rows: Sequence[Any]) -> list[tuple[Any, str]]:
    """Rows with the names of their rules; one row for "both" if the two rules agree on every
    answer.
    """
    by_rule = {(row.data, row.split, row.rule): row for row in rows}
    kept = []
    for row in rows:
        same = [
            repr(dataclasses.replace(twin, rule=row.rule)) == repr(row)  # NaN does not equal itself
            for other in RULES
            if row.rule in RULES and (twin := by_rule.get((row.data, row.split, other)))
        ]
        if len(same) == len(RULES) and all(same):
            kept += [(row, "both")] if row.rule == next(iter(RULES)) else []
        else:
            kept.append((row, row.rule))
    return kept


def _with_interval(estimate: Estimate) -> str:
    if math.isnan(estimate.low):
        return f"{estimate.value:+.2f}"
    return f"{estimate.value:+.2f} ({estimate.low:+.2f} to {estimate.high:+.2f})"


def _p(value: float) -> str:
    return "" if math.isnan(value) else "<0.001" if value < 0.001 else f"{value:.3f}"
