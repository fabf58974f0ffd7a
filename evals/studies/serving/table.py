"""The figures of the study, as a section for RESULTS.md."""

import statistics
from collections.abc import Mapping
from typing import Any

from hipp_ext.evals.studies.serving.versions import DENSE

COLUMNS = ("model", "parameters", "perplexity")


def section(result: Mapping[str, Any]) -> str:
    """A table: one row per version, three columns per runtime."""
    settings = result["settings"]
    head = [*COLUMNS, *(f"{name}: prompt, further, memory" for name in settings)]
    rows = [head, ["---"] * len(head)]
    for name, facts in result["models"].items():
        cells = [name, f"{facts['parameters'] / 1e6:.1f}M", f"{facts['perplexity']:.1f}"]
        rows.append([*cells, *(_cell(s["models"].get(name), name) for s in settings.values())])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    parts = ["## Serving a pruned SmolLM2-135M", f"`{result['command']}`", _notes(result), table]
    return "\n\n".join(parts) + "\n"


def _cell(row: Mapping[str, Any] | None, name: str) -> str:
    """Speed-ups and memory over dense; of the dense model the figures themselves."""
    if row is None:
        return ""
    if name == DENSE:
        values = [statistics.median(row[k]) for k in ("prefill_ms", "decode_ms", "memory_mib")]
        return "{:.0f} ms, {:.2f} ms, {:.0f} MiB".format(*values)
    speeds = [_spread(row[key]) for key in ("prefill_speedup", "decode_speedup")]
    return f"{speeds[0]}, {speeds[1]}, {row['memory_ratio']['median']:.2f}"


def _spread(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f}x ({ratio['least']:.2f} to {ratio['most']:.2f})"


def _notes(result: Mapping[str, Any]) -> str:
    some = next(iter(result["settings"].values()))["serving"]
    return (
        f"{result['device']}, {some['threads']} thread, prompts of {some['tokens']} tokens, "
        f"{some['new_tokens']} new ones. Each cell: how many times faster than dense the prompt "
        f"and every further token are, as median (least to most) of {some['rounds']} rounds "
        "in which the models take turns, and the memory over dense (growth of the process from "
        "before the model is loaded to its peak). Perplexity: transformers, float32, reconstructed "
        "plans of the allocator Sensitivity on one draw of the calibration."
    )
