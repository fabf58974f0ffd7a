"""Time and memory of models in a runtime, as cells: the table of `hipp latency --runtime` and of
reports.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hipp_ext.files.untrusted import short_name

RUNTIME_COLUMNS = (
    "model",
    "prompt [ms]",
    "further token [ms]",
    "faster (prompt, further)",
    "memory [MiB]",
)


def runtime_rows(models: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The cells of `RUNTIME_COLUMNS` for each model of `runtimes.measure_folders`."""
    return [_cells(name, row) for name, row in models.items()]


def _cells(name: str, row: Mapping[str, Any]) -> list[str]:
    faster = ""
    if row.get("prefill_speedup"):
        pairs = (row["prefill_speedup"], row["decode_speedup"])
        faster = ", ".join(f"{pair['median']:.2f}x" for pair in pairs)
    memory = [mib for mib in row["memory_mib"] if mib is not None]
    return [
        short_name(name),
        _spread(row["prefill_ms"]),
        _spread(row["decode_ms"]),
        faster,
        f"{statistics.median(memory):.0f}" if memory else "not known",
    ]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
