"""The result of the study in a terminal."""

from collections.abc import Mapping
from typing import Any

from hipp_ext.evals.studies.real_lm.jobs import SIDES


def print_table(summary: Mapping[str, Any]) -> None:
    """Perplexity by ratio, and below each method what reconstruction makes of it."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    methods = summary["methods"]
    ratios = sorted({r for m in methods.values() for side in SIDES for r in m[side]}, key=float)
    title = f"perplexity, mean ± standard error over draws; dense {summary['dense']:.2f}"
    table = Table(title=title, box=SIMPLE_HEAD)
    columns = ["", "passes", "seconds", *(f"{float(r):.0%}" for r in ratios)]
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for name, row in methods.items():
        costs = [f"{row[what]['mean']:.1f}" for what in ("passes", "seconds")]
        for side in SIDES:
            if row[side]:
                first = [name, *costs] if side == SIDES[0] else ["  reconstructed", "", ""]
                table.add_row(*first, *(_cell(row[side].get(r)) for r in ratios))
    Console(width=max(140, Console().width), markup=False).print(table)


def _cell(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    digits = 1 if value["mean"] < 1000 else 0
    error = "" if value["se"] is None else f" ± {value['se']:,.{digits}f}"
    return f"{value['mean']:,.{digits}f}{error}"
