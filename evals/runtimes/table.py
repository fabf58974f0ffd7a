"""Figures of models in a runtime, and times of blocks, as tables of text."""

from collections.abc import Mapping
from typing import Any

from hipp_ext.evals.latency import QUICK
from hipp_ext.evals.runtime_table import RUNTIME_COLUMNS, runtime_rows
from hipp_ext.evals.runtimes import Serving
from hipp_ext.evals.text_table import print_table, text_table
from hipp_ext.latency_table import LatencyTable


def print_figures(found: Mapping[str, Mapping[str, Any]], serving: Serving) -> None:
    """One line per model of `measure_folders`."""
    title = (
        f"{serving.runtime} {serving.weights}, {serving.threads} threads, prompt of "
        f"{serving.tokens} tokens; median (least to most) of {serving.rounds} rounds"
        f"{QUICK * serving.quick}"
    )
    print_table(text_table(RUNTIME_COLUMNS, runtime_rows(found), title=title))


def print_blocks(table: LatencyTable) -> None:
    """Times of one block of each kind, by units."""
    rows = [
        [kind, str(units), f"{ms:.3f}", f"{prefill:.2f}"]
        for kind, entries in table.decode.blocks.items()
        for (units, ms), (_, prefill) in zip(entries, table.prefill.blocks[kind], strict=True)
    ]
    rows.append(["the rest", "", f"{table.decode.rest_ms:.3f}", f"{table.prefill.rest_ms:.2f}"])
    rows.append(
        ["the model", "", f"{table.dense_ms('decode'):.3f}", f"{table.dense_ms('prefill'):.2f}"]
    )
    quick = QUICK if table.conditions.get("quick") else ""
    title = f"times in {table.runtime}, {table.layers} layers{quick}"
    columns = ("block", "units", "further token [ms]", "prompt [ms]")
    print_table(text_table(columns, rows, title=title))
