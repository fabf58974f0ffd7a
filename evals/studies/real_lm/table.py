"""The result of the study as a table: in a terminal, and as a section of RESULTS.md."""

from collections.abc import Mapping
from typing import Any

from hipp_ext.evals.studies.real_lm.jobs import SIDES
from hipp_ext.evals.studies.real_lm.methods import HIPP

SECTION = """## A real language model

SmolLM2-135M-Instruct (Q4_1 weights as float32, 106.2M parameters in attention and FFN), nothing
trained. Perplexity on {test_rows} x {test_length} tokens of {text}, calibration on {rows} x
{length} other tokens of it; mean ± standard error over {draws} draws of the calibration. "Passes"
are forward passes over the calibration that one plan costs (a backward pass without weight
gradients counts as one), seconds are those of {threads} CPU thread(s). The second line of a method
is with least-squares reconstruction on the same calibration. Dense: {dense:.2f}.

{table}

![Perplexity against parameters removed](results/{name}.png)

- hipp (anchored) against the best method of others, log of the ratio of perplexities, paired over
  the test rows: {claims}.
- torch-pruning is its example for language models, which also removes channels of the residual
  stream; widths are chosen so that the layers lose what is asked. ShortGPT removes whole layers, so
  nothing is left to reconstruct. "FLAP adaptive" is FLAP's allocation without its bias.
"""


def rows_of(summary: Mapping[str, Any]) -> list[list[str]]:
    """The header, then one row for every method and side."""
    methods = summary["methods"]
    ratios = sorted({r for m in methods.values() for side in SIDES for r in m[side]}, key=float)
    rows = [["", "passes", "seconds", *(f"{float(r):.0%}" for r in ratios)]]
    for name, row in methods.items():
        first = [name, *(f"{row[what]['mean']:,.1f}" for what in ("passes", "seconds"))]
        for side in SIDES:
            if row[side]:
                own = first if side == SIDES[0] else ["  reconstructed", "", ""]
                rows.append([*own, *(_cell(row[side].get(r)) for r in ratios)])
    return rows


def print_table(summary: Mapping[str, Any]) -> None:
    """Perplexity by ratio, and below each method what reconstruction makes of it."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    title = f"perplexity, mean ± standard error over draws; dense {summary['dense']:.2f}"
    table = Table(title=title, box=SIMPLE_HEAD)
    head, *rows = rows_of(summary)
    for i, column in enumerate(head):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=max(140, Console().width), markup=False).print(table)


def section(result: Mapping[str, Any], name: str, draws: int) -> str:
    """The section of RESULTS.md; what is to be said about the figures is not in it.

    Args:
        result: what `summarize` returned, with the study's identity and threads.
        name: name of the picture.
        draws: number of draws.
    """
    head, *rows = rows_of(result)
    lines = [head, ["---"] * len(head), *(_bold(row) for row in rows)]
    gains = [
        f"{where} {found['mean']:+.3f} ± {found['se'] or 0:.3f} over {found['over']}"
        for where, found in result["hipp over the best other"].items()
    ]
    return SECTION.format(
        **result["identity"]["size"],
        text=name.removeprefix("real_lm_") if name != "real_lm" else "Python's help topics",
        draws=draws,
        threads=result["threads"],
        dense=result["dense"],
        table="\n".join(f"| {' | '.join(cell.strip() for cell in row)} |" for row in lines),
        name=name,
        claims="; ".join(gains) or "not measured",
    )


def _bold(row: list[str]) -> list[str]:
    return [f"**{row[0]}**", *row[1:]] if row[0] == HIPP else row


def _cell(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    digits = 1 if value["mean"] < 1000 else 0
    error = "" if value["se"] is None else f" ± {value['se']:,.{digits}f}"
    return f"{value['mean']:,.{digits}f}{error}"
