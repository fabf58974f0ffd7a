"""Comparisons as tables for the terminal: a wide one, or short ones below each other."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hipp_ext.evals.pope import RULES
from hipp_ext.evals.statistics import Estimate
from hipp_ext.files.untrusted import shown

if TYPE_CHECKING:
    from rich.table import Table

_NAMES = ("data", "rule", "split")
_SCORES = ("n", "A", "B", "B - A", "p (bootstrap)", "p (McNemar)")
_REST = ("only A/B correct", "F1 B - A", "yes A/B", "n for 1 point")
_MAX_NAME = 20  # length of the name of a split or a data set [characters]


class ComparisonTable:
    """A table of comparisons for rich; names in it are never read as markup.

    Args:
        rows: `Comparison`s.
        level: confidence level of their intervals.
        note: sentence below the table; empty for none.
    """

    def __init__(self, rows: Sequence[Any], level: float, note: str):
        self._title = f"accuracy in percent; B - A in points, with its {100 * level:g}% interval"
        self._rows = [
            ((row.data, rule, row.split), _scores(row), _rest(row))
            for row, rule in _without_repetition(rows)
        ]
        self._note = note

    def __rich_measure__(self, console: Any, options: Any) -> Any:
        """The smaller of the widths of the wide table and the terminal."""
        from rich.measure import Measurement

        widest = Measurement.get(console, options.update(width=1000), self._wide()).maximum
        return Measurement(min(widest, 40), min(widest, console.width))

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """The wide table if it fits."""
        from rich.text import Text

        wide = self._wide()
        if console.measure(wide, options=options.update(width=1000)).maximum <= options.max_width:
            yield wide
        else:
            yield Text(self._title + "\n", "italic")
            yield from self._blocks()
        if self._note:
            yield Text(self._note)

    def _wide(self) -> "Table":
        table = _table((*_NAMES, *_SCORES, *_REST), left=len(_NAMES), title=self._title)
        for names, scores, rest in self._rows:
            table.add_row(*_plain(names), *scores, *rest)
        return table

    def _blocks(self) -> Iterator[Any]:
        """For each data set and rule: its name, a table of accuracies, and a table of the other
        columns.
        """
        from rich.text import Text

        for data, rule in dict.fromkeys(names[:2] for names, *_ in self._rows):
            own = [
                (names[2], scores, rest)
                for names, scores, rest in self._rows
                if names[:2] == (data, rule)
            ]
            yield Text(f"{shown(data, 40)}, rule: {rule}", "bold")
            for columns, cells in (
                (_SCORES, [scores for _, scores, _ in own]),
                (_REST, [rest for *_, rest in own]),
            ):
                table = _table(("split", *columns), left=1, short=True)
                for (split, *_), texts in zip(own, cells, strict=True):
                    table.add_row(*_plain([split]), *texts)
                yield table
                yield ""


def _table(
    columns: Sequence[str], *, left: int, title: str | None = None, short: bool = False
) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD)
    if short:
        table.padding, table.pad_edge, table.show_edge = (0, 1, 0, 0), False, False
    for number, name in enumerate(columns):
        head = name.replace("p (", "p\n(").replace(" correct", "\ncorrect") if short else name
        # In a narrow terminal a split's name may wrap; numbers never do.
        may_wrap = short and number < left
        table.add_column(
            head,
            justify="left" if number < left else "right",
            no_wrap=not may_wrap,
            overflow="fold",
        )
    return table


def _plain(names: Sequence[str]) -> list[Any]:
    from rich.text import Text

    return [Text(shown(name, _MAX_NAME)) for name in names]


def _scores(row: Any) -> list[str]:
    own = row.paired
    return [
        str(own.n),
        f"{own.a:.2f}",
        f"{own.b:.2f}",
        _with_interval(own.difference),
        _p(own.difference.p_value),
        _p(own.mcnemar_p),
    ]


def _rest(row: Any) -> list[str]:
    return [
        f"{row.paired.only_a}/{row.paired.only_b}",
        "" if row.f1 is None else _with_interval(row.f1),
        "" if row.yes_a is None else f"{row.yes_a:.1f}/{row.yes_b:.1f}",
        f"{row.questions_for_a_point:,}",
    ]


def _without_repetition(rows: Sequence[Any]) -> list[tuple[Any, str]]:
    """Rows with the names of their rules; one row for "both" if POPE's two rules agree on every
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
