"""`hipp latency --per-block`: how long the blocks of a model take, from times of whole models.

A runtime tells how long a model takes, not how long one of its blocks does. So versions of the
model are measured that differ from it in one thing: fewer layers, narrower attention, narrower FFN.
"""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from hipp_ext.errors import DataError
from hipp_ext.evals.runtimes import Serving, measure_folders
from hipp_ext.groups import Group, find_groups
from hipp_ext.latency_table import LatencyTable, Phase, Run, block_times
from hipp_ext.surgery.checkpoint import load_pruned, save_pruned
from hipp_ext.surgery.prune import prune
from hipp_ext.units import plan_from_counts

FRACTIONS = (0.5, 0.25)  # of the units, that the narrower versions keep


def measure_blocks(folder: Path, serving: Serving, *, show: bool = True) -> LatencyTable:
    """The latency table of a model folder in a runtime.

    Args:
        folder: a dense model; which of its units stay in the narrower versions does not matter.
        serving: runtime, prompt and repeats.
        show: show a progress bar.

    Raises:
        DataError: layers differ, or the runtime failed.
    """
    model = load_pruned(folder)
    groups = find_groups(model)
    versions = _versions(groups)
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of processors: prompts are token ids
        folders = {"dense": folder}
        for name, counts in versions.items():
            scores = {g.name: -torch.arange(g.width).float() for g in groups}
            small = prune(model, plan_from_counts(groups, counts, scores))
            folders[name] = save_pruned(small, Path(temporary) / name)
        del model
        found = measure_folders(folders, serving, show=show)
    times = {}
    phases: tuple[Phase, ...] = ("decode", "prefill")
    for phase in phases:
        # The fastest round is the one that other work on the machine disturbed least.
        ms = {name: min(figures[f"{phase}_ms"]) for name, figures in found.items()}
        times[phase] = block_times(_runs(groups, versions, ms))
    given = asdict(serving).items()
    conditions = {k: v for k, v in given if k != "runtime" and v is not None and v is not False}
    return LatencyTable(
        runtime=serving.runtime,
        conditions=conditions | {"model": folder.resolve().name},
        layers=len({g.layer for g in groups}),
        **times,
    )


def _versions(groups: Sequence[Group]) -> dict[str, list[int]]:
    """Name -> keep counts of the versions that are measured beside the dense model.

    Raises:
        DataError: layers differ, or there is but one.
    """
    dense = {g.kind: g.width for g in groups}
    removable = sorted({g.layer for g in groups if g.removable})
    if any(g.width != dense[g.kind] for g in groups) or len(removable) < 2:
        raise DataError(
            "Times of blocks are told from a model with several layers, all alike: measure the "
            "dense model."
        )
    gone = set(removable[: len(removable) // 2])
    versions = {"fewer layers": [0 if g.layer in gone else g.width for g in groups]}
    for kind, width in dense.items():
        for units in sorted({max(1, round(f * width)) for f in FRACTIONS} - {width}):
            counts = [units if g.kind == kind else g.width for g in groups]
            versions[f"{kind} {units}"] = counts
    return versions


def _runs(
    groups: Sequence[Group], versions: Mapping[str, Sequence[int]], ms: Mapping[str, float]
) -> list[Run]:
    """The dense model's time, and those of the versions."""
    dense = {g.kind: g.width for g in groups}
    runs = [Run(widths=dense, layers=len({g.layer for g in groups}), ms=ms["dense"])]
    for name, counts in versions.items():
        kept = [(g, k) for g, k in zip(groups, counts, strict=True) if k]
        widths = {g.kind: k for g, k in kept}
        runs.append(Run(widths=widths, layers=len({g.layer for g, _ in kept}), ms=ms[name]))
    return runs
