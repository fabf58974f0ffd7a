"""`hipp latency`: what a generation costs a model and its pruned versions; see generation.py."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hipp_ext.errors import DataError
from hipp_ext.evals import text_table
from hipp_ext.evals.generation import Workload, measure
from hipp_ext.evals.generation_memory import extra_mib_on_cpu
from hipp_ext.evals.measuring import describe
from hipp_ext.files import write_atomic
from hipp_ext.files.untrusted import short_name
from hipp_ext.plan import PruningPlan
from hipp_ext.surgery.checkpoint import load_pruned, resolve_device, save_pruned
from hipp_ext.surgery.prune import prune

QUICK = "; a quick look, not for comparisons"
COST_COLUMNS = (
    "model",
    "parameters",
    "GFLOPs of the prompt",
    "first token [ms]",
    "further token [ms]",
    "faster (first, further)",
    "weights [MiB]",
    "peak [MiB]",
)


def folders(
    models: Mapping[str, str | Path], plans: Sequence[str | Path], into: Path
) -> dict[str, Path]:
    """Name -> folder of the models, and of the first model pruned by each plan.

    A pruned model is saved below `into` and takes the name of its plan's file.

    Raises:
        CheckpointError, PlanError: a folder is not a model, or a plan is not the first model's.
        DataError: a plan's name is taken.
    """
    made = {name: Path(folder) for name, folder in models.items()}
    dense = next(iter(made.values()))
    for file in map(Path, plans):
        if file.stem in made:
            raise DataError(f"two models are called {file.stem}: rename {file}")
        small = prune(load_pruned(dense), PruningPlan.load(file), inplace=True)
        made[file.stem] = save_pruned(small, into / file.stem)
    return made


def run(
    models: Mapping[str, str | Path],
    plans: Sequence[str | Path] = (),
    workload: Workload | None = None,
    *,
    inputs: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    command: str = "hipp latency",
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure model folders, the first against the others; returns the result.

    Args:
        models: name to model folder; the others are compared with the first.
        plans: plan files; each adds the first model pruned by it.
        workload: what every model generates.
        inputs: safetensors file with the inputs of all models; None: see `prompts`.
        device: torch device; None: the GPU if there is one.
        dtype: name of a torch dtype; None: as stored.
        command: the command line that is recorded in the result.
        out: also write the result to this file.
    """
    workload, device = workload or Workload(), resolve_device(device)
    stored_as = getattr(torch, dtype) if dtype else None
    with tempfile.TemporaryDirectory() as temporary:
        made = folders(models, plans, Path(temporary))
        loaded = {n: load_pruned(f, device=device, dtype=stored_as) for n, f in made.items()}
        rows = measure(loaded, workload, load_file(inputs) if inputs else None)
        loaded.clear()
        if device.startswith("cpu"):
            extra = extra_mib_on_cpu(list(made.values()), workload, dtype, inputs)
            for row, mib in zip(rows.values(), extra, strict=True):
                row["extra_mib"] = mib
    for row in rows.values():
        row["peak_mib"] = row["weights_mib"] + row["extra_mib"]
    result = describe(command, {"load": asdict(workload), "models": rows}, device)
    if out:
        write_atomic(out, json.dumps(result, indent=1) + "\n")
    return result


def print_table(result: Mapping[str, Any]) -> None:
    """One line per model."""
    workload = result["load"]
    title = (
        f"{result['device']}, {result['threads']} threads, batch {workload['rows']}, "
        f"{workload['new_tokens']} tokens; median (quartiles) of {workload['repeats']} runs"
        f"{QUICK * workload.get('quick', False)}"
    )
    text_table.print_table(text_table.text_table(COST_COLUMNS, cost_rows(result), title=title))


def cost_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The cells of `COST_COLUMNS` for each model of a result."""
    return [
        [
            short_name(name),
            text_table.parameters_text(row["parameters"]),
            f"{row['prefill_gflops']:.2f}",
            _spread_text(row["prefill_ms"]),
            _spread_text(row["decode_ms"]),
            _speedup_text(row),
            f"{row['weights_mib']:.1f}",
            f"{row['peak_mib']:.1f}",
        ]
        for name, row in result["models"].items()
    ]


def _spread_text(spread: Mapping[str, float]) -> str:
    """Median and quartiles in one cell."""
    return f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"


def _speedup_text(row: Mapping[str, Any]) -> str:
    """How many times faster than the first model; empty for the first model."""
    return (
        f"{row['prefill_speedup']['median']:.2f}x, {row['decode_speedup']['median']:.2f}x"
        if "prefill_speedup" in row
        else ""
    )
