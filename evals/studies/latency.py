"""`hipp bench latency`: what generating costs a model and its pruned versions; the figures are explained in generation.py."""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hipp_ext.budget import keep_counts
from hipp_ext.errors import DataError
from hipp_ext.evals.studies.generation import Load, extra_mib_on_cpu, measure, shaped_batch
from hipp_ext.evals.studies.measuring import describe, show
from hipp_ext.evals.studies.shapes import random_llava
from hipp_ext.files.untrusted import short_name
from hipp_ext.groups import find_groups
from hipp_ext.plan import PruningPlan
from hipp_ext.scorers import Magnitude
from hipp_ext.surgery.checkpoint import load_pruned, save_pruned
from hipp_ext.surgery.prune import prune
from hipp_ext.units import plan_from_counts

HIDDEN, LAYERS = 1024, 8  # of the random model: LLaVA-1.5's proportions and token counts, smaller


def shaped_folders(into: Path, removed: float, hidden: int, layers: int) -> dict[str, Path]:
    """A random LLaVA-shaped model, and the same uniformly pruned, as folders."""
    model = random_llava(hidden, layers)
    groups = find_groups(model)
    plan = plan_from_counts(groups, keep_counts(groups, None, removed), Magnitude()(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they have no processor, and need none
        return {
            "dense": save_pruned(model, into / "dense"),
            "pruned": save_pruned(prune(model, plan), into / "pruned"),
        }


def folders(
    models: Mapping[str, str | Path], plans: Sequence[str | Path], into: Path
) -> dict[str, Path]:
    """Name -> folder of the models, and of the first one pruned by each plan, whose name is that of its file.

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
    models: Mapping[str, str | Path] | None = None,
    plans: Sequence[str | Path] = (),
    load: Load | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    removed: float = 0.3,
    hidden: int = HIDDEN,
    layers: int = LAYERS,
    command: str = "hipp bench latency",
    save: bool = False,
    out: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure model folders, the first against the others; without any, random weights of LLaVA's shape.

    Args:
        models: name to folder; the first is the one compared with.
        plans: each makes one more model out of the first.
        load: what they do.
        device, dtype: None: the GPU if there is one; as stored.
        removed, hidden, layers: of the random models, where no folder is given.
        command: what to say it was made with.
        save: write it into the package's results.
        out: also write it to this file.
        quiet: print no table.
    """
    from hipp_ext.surgery.checkpoint import resolve_device

    load, place, kept = (
        load or Load(),
        resolve_device(device),
        getattr(torch, dtype) if dtype else None,
    )
    with tempfile.TemporaryDirectory() as temporary:
        made = (
            folders(models, plans, Path(temporary))
            if models
            else shaped_folders(Path(temporary), removed, hidden, layers)
        )
        loaded = {
            name: load_pruned(folder, device=place, dtype=kept) for name, folder in made.items()
        }
        rows = measure(loaded, load, None if models else shaped_batch(load))
        loaded.clear()
        if place.startswith("cpu"):
            extra = extra_mib_on_cpu(list(made.values()), load, dtype, shaped=not models)
            for row, mib in zip(rows.values(), extra, strict=True):
                row["extra_mib"] = mib
    for row in rows.values():
        row["peak_mib"] = row["weights_mib"] + row["extra_mib"]
    shape = (
        {}
        if models
        else {
            "shape": {"hidden": hidden, "layers": layers, "tokens": 637, "pruning_ratio": removed}
        }
    )
    result = describe(command, {"load": asdict(load), **shape, "models": rows}, place)
    if not quiet:
        print_table(result)
    show("latency", result, save=save, out=out, quiet=True)
    return result


def print_table(result: Mapping[str, Any]) -> None:
    """One line per model."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    load = result["load"]
    table = Table(
        title=f"{result['device']}, {result['threads']} threads, batch {load['rows']}, {load['new_tokens']} tokens; "
        f"median (quartiles) of {load['repeats']} runs",
        box=SIMPLE_HEAD,
    )
    for column in (
        "model",
        "parameters",
        "GFLOPs",
        "first token [ms]",
        "per token [ms]",
        "faster (first, further)",
        "weights [MiB]",
        "peak [MiB]",
    ):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for name, row in result["models"].items():
        table.add_row(
            short_name(name),
            f"{row['parameters'] / 1e6:.2f}M",
            f"{row['prefill_gflops']:.2f}",
            spread_text(row["prefill_ms"]),
            spread_text(row["decode_ms"]),
            speedup_text(row),
            f"{row['weights_mib']:.1f}",
            f"{row['peak_mib']:.1f}",
        )
    console = Console(markup=False)  # names are those of folders, and [ms] is no style
    (console if console.is_terminal else Console(width=160, markup=False)).print(table)


def spread_text(spread: Mapping[str, float]) -> str:
    """Median and quartiles in one cell."""
    return f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"


def speedup_text(row: Mapping[str, Any]) -> str:
    """How many times faster than the first model; empty for that one."""
    return (
        f"{row['prefill_speedup']['median']:.2f}x, {row['decode_speedup']['median']:.2f}x"
        if "prefill_speedup" in row
        else ""
    )
