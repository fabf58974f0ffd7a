"""A plan as a table: one row per layer, neighbours that are alike in one row."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hipp_ext.families import BLOCKS
from hipp_ext.kinds import KINDS

if TYPE_CHECKING:
    from hipp_ext.plan import PlanGroup

BAR = 10  # characters of a group that keeps all units
Layer = tuple[str, int]  # tower, number


def layer_table(groups: Sequence["PlanGroup"]) -> Table:
    """How many units of how many stay in the blocks of every layer; a dash: no block is planned."""
    by_layer: dict[Layer, dict[str, list[PlanGroup]]] = {}
    for g in groups:
        by_layer.setdefault((g.tower, g.layer), {}).setdefault(g.place, []).append(g)
    places = [place for place in BLOCKS if any(g.place == place for g in groups)]
    table = Table(box=SIMPLE_HEAD, header_style="", padding=(0, 1, 0, 0))  # no escape codes
    table.add_column("layer")
    for place in places:
        units = dict.fromkeys(KINDS[g.kind].unit for g in groups if g.place == place)
        table.add_column("\n".join([place, *units]), justify="right", min_width=len(place))
        table.add_column("of", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
    rows = [(layer, _cells(own, places)) for layer, own in by_layer.items()]
    for (tower, cells), alike in itertools.groupby(rows, lambda row: (row[0][0], row[1])):
        numbers = [layer for (_, layer), _ in alike]
        for line, shown in enumerate(cells):
            table.add_row("" if line else f"{tower} {_span(numbers)}", *shown)
    return table


def _cells(blocks: dict[str, list["PlanGroup"]], places: Sequence[str]) -> tuple[tuple, ...]:
    """The cells of a layer, a line for each group of the place that has most of them."""
    lines = itertools.zip_longest(*(blocks.get(place, []) for place in places))
    return tuple(sum((_cell(group) for group in line), ()) for line in lines)


def _cell(group: "PlanGroup | None") -> tuple[str, str, str]:
    if group is None:
        return "-", "", ""
    return str(group.keep), str(group.width), "\u2588" * round(BAR * group.keep / group.width)


def _span(numbers: Sequence[int]) -> str:
    """Ascending numbers in words: 3; 0-5; 0,2,4."""
    if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))
