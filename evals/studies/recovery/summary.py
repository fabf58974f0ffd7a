"""Values of items -> means with errors, arms compared item by item, and the targets."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hipp_ext.evals.statistics import clustered_mean_se
from hipp_ext.evals.studies.recovery.cells import ARMS, BASE, LABELS, start_name
from hipp_ext.evals.studies.recovery.language import KL, LOSS, OTHER

Rows = Sequence[Mapping[str, Any]]
Clusters = Mapping[str, Sequence[str]]
WITHIN_PERPLEXITY = 0.15  # of the dense one, at 30%
WITHIN_POINTS = 2.0  # of the dense model, at 60%
# Task, measure, and whether more or less of it is better.
_AIMS = (("testbed", "POPE", 1), *(("smollm2", m, -1) for m in (LOSS, OTHER, KL)))


def summarize(found: Mapping[str, Any], clusters: Clusters) -> dict[str, Any]:
    """What is known of a task: dense, and by ratio before recovery, by arm, and comparisons.

    Every figure has mean, se, n (items) and seeds. Its standard error is the root of two squares:
    that over clusters of items, of the mean over seeds, and that over seeds, where there are some.

    Args:
        found: of `TaskStudy.run`.
        clusters: of `Task.clusters`.
    """
    cells = [row for row in found.values() if "cell" in row]
    ratios = sorted({row["cell"]["ratio"] for row in cells})
    return {
        "dense": _figures([found["dense"]], clusters),
        "ratios": {
            f"{r:.0%}": _at(found, [c for c in cells if c["cell"]["ratio"] == r], clusters)
            for r in ratios
        },
        "search": {
            name.removeprefix("search "): row["validation"]
            for name, row in found.items()
            if name.startswith("search ")
        },
    }


def _at(found: Mapping[str, Any], cells: Rows, clusters: Clusters) -> dict[str, Any]:
    ratio = cells[0]["cell"]["ratio"]
    by_arm = {arm: own for arm in ARMS if (own := [c for c in cells if c["cell"]["arm"] == arm])}
    before = {
        start: _figures([found[name]], clusters)
        for start in ("sliced", "reconstructed")
        if (name := start_name(ratio, start)) in found
    }
    return {
        "before": before,
        "arms": {arm: _arm(rows, clusters) for arm, rows in by_arm.items()},
        "distillation minus it": {
            arm: _differences(by_arm[BASE], rows, clusters)
            for arm, rows in by_arm.items()
            if arm != BASE and BASE in by_arm and ARMS[arm].compression is None
        },
        "minus dense": {
            arm: _differences(rows, [found["dense"]], clusters) for arm, rows in by_arm.items()
        },
    }


def _arm(rows: Rows, clusters: Clusters) -> dict[str, Any]:
    facts = {n: rows[0][n] for n in ("lr", "steps", "bytes", "fp32_bytes") if n in rows[0]}
    minutes = statistics.fmean(row["seconds"] for row in rows) / 60
    return {**_figures(rows, clusters), **facts, "minutes": minutes}


def _figures(rows: Rows, clusters: Clusters) -> dict[str, Any]:
    """Measure -> figure."""
    return {m: _figure([row["values"][m] for row in rows], own) for m, own in clusters.items()}


def _differences(rows: Rows, others: Rows, clusters: Clusters) -> dict[str, Any]:
    """Measure -> figure of rows minus others, item by item, at the seeds that both have."""
    if len(others) == 1 and "cell" not in others[0]:
        pairs = [(row, others[0]) for row in rows]
    else:
        by_seed = {row["cell"]["seed"]: row for row in others}
        pairs = [(r, by_seed[s]) for r in rows if (s := r["cell"]["seed"]) in by_seed]
    found = {}
    for measure, own in clusters.items():
        values = [np.subtract(a["values"][measure], b["values"][measure]) for a, b in pairs]
        found[measure] = _figure(values, own) if values else None
    return found


def _figure(values: Sequence[Any], clusters: Sequence[str]) -> dict[str, Any]:
    each = np.asarray(values, dtype=float)
    seeds = each.mean(1)
    error = clustered_mean_se(each.mean(0), clusters)
    if len(seeds) > 1:
        error = math.hypot(error, float(seeds.std(ddof=1)) / len(seeds) ** 0.5)
    return {
        "mean": float(each.mean()),
        "se": error,
        "n": each.shape[1],
        "seeds": len(seeds),
        "values": seeds.tolist(),
    }


def targets(tasks: Mapping[str, Any]) -> list[str]:
    """What was aimed at, what came out, and whether that is met; a line each.

    Args:
        tasks: task -> its summary.
    """
    lines = []
    if row := _arm_of(tasks, "smollm2", "30%"):
        ratio = math.exp(row[LOSS]["mean"])
        lines.append(
            f"SmolLM2 30% within {WITHIN_PERPLEXITY:.0%} of dense perplexity: "
            f"{ratio - 1:+.1%} ± {ratio * row[LOSS]['se']:.1%}"
            f" ({_met(ratio <= 1 + WITHIN_PERPLEXITY)})"
        )
    if row := _arm_of(tasks, "testbed", "60%"):
        drops = {m: row[m] for m in ("POPE", "ScienceQA")}
        told = ", ".join(f"{m} {d['mean']:+.1f} ± {d['se']:.1f}" for m, d in drops.items())
        met = all(d["mean"] >= -WITHIN_POINTS for d in drops.values())
        lines.append(
            f"Testbed 60% within {WITHIN_POINTS:g} points of dense on both tasks: {told} "
            f"({_met(met)})"
        )
    for task, measure, sign in _AIMS:
        for ratio, found in tasks.get(task, {}).get("ratios", {}).items():
            gain = (found["distillation minus it"].get(LABELS) or {}).get(measure)
            if gain:
                met = sign * gain["mean"] > 2 * gain["se"]
                lines.append(
                    f"Distillation minus cross-entropy, {task} {ratio}, {measure}, beyond two "
                    f"standard errors: {gain['mean']:+.3f} ± {gain['se']:.3f}, "
                    f"{gain['seeds']} seed(s) ({_met(met)})"
                )
    return lines


def _arm_of(tasks: Mapping[str, Any], task: str, ratio: str) -> Any:
    return tasks.get(task, {}).get("ratios", {}).get(ratio, {}).get("minus dense", {}).get(BASE)


def _met(met: bool) -> str:
    return "met" if met else "missed"
