"""Which way of choosing plans is best, at equal evaluations, on the testbed's test split?

All jobs of a study -> one table, the differences that the claims are about, and a picture.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hipp_ext import testbed
from hipp_ext.allocators import ALLOCATORS
from hipp_ext.evals.statistics import bootstrap_estimate, f1_percent
from hipp_ext.evals.studies.measuring import keep_picture, mean_and_se, report
from hipp_ext.evals.studies.search.control import steering
from hipp_ext.evals.studies.search.methods import METHODS
from hipp_ext.evals.studies.search.study import (
    HIPP,
    INFORMED,
    RATIOS,
    SEARCHES,
    UNTRAINED,
    StudySize,
    all_jobs,
    run_study,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRIC = {"robustness": "F1", "utility": "ScienceQA"}  # the metric of each corner
Jobs = Mapping[str, Sequence[Mapping[str, Any]]]


def run(
    size: StudySize, folder: Path, *, processes: int | None = None, save: bool = False
) -> dict[str, Any]:
    """Run the missing jobs of the study in `folder`, summarize all, and draw a picture there."""
    results = run_study(size, folder, all_jobs(size), processes=processes)
    jobs: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        jobs.setdefault(result["method"], []).append(result)
    methods = {name: _row(rows) for name, rows in jobs.items()}
    values = {
        "size": dataclasses.asdict(size),
        "methods": methods,
        "claims": _claims(jobs),
        "paired": _paired(jobs, size),
        "control": steering(jobs[HIPP]) | {"untrained": steering(jobs[UNTRAINED])["policy"]},
    }
    print_table(methods)
    pope, choice = size.questions
    name = "search" if size.questions == StudySize.questions else f"search_{pope}_{choice}"
    result = report(name, values, save)
    keep_picture(name, _picture(methods), save=save, folder=folder)
    return result


def _row(jobs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    table: dict[str, dict[str, Any]] = {}
    for corner, metric in METRIC.items():
        table[corner] = {}
        for r in map(str, RATIOS):
            cell = [j["table"][corner][r][metric] for j in jobs if r in j["table"][corner]]
            table[corner][r] = mean_and_se(cell) if cell else None
    searched = [j["hypervolume"]["search"] for j in jobs if j["hypervolume"]["search"] is not None]
    return {
        "hypervolume": mean_and_se([j["hypervolume"]["test"] for j in jobs]),
        "hypervolume_on_search_split": mean_and_se(searched) if searched else None,
        "evaluations": jobs[0]["evaluations"],
        "seconds": mean_and_se([j["seconds"] for j in jobs]),
        "table": table,
    }


def _claims(jobs: Jobs) -> dict[str, Any]:
    """The differences that the claims are about: positive means that hipp is better."""
    hypervolume = {name: [j["hypervolume"]["test"] for j in rows] for name, rows in jobs.items()}
    claims: dict[str, Any] = {}
    for suffix, searches in (("", METHODS), ("_over_informed", INFORMED)):
        best = max(searches, key=lambda name: statistics.fmean(hypervolume[name]))
        pairs = zip(hypervolume[HIPP], hypervolume[best], strict=True)
        gain = mean_and_se([100 * (a / b - 1) for a, b in pairs])
        claims[f"hypervolume_gain_percent{suffix}"] = {"over": best, **gain}
    for corner, metric in METRIC.items():
        for ratio in map(str, RATIOS):
            cell = {}
            for name in (*ALLOCATORS, UNTRAINED):
                fixed = jobs[name][0]["table"][corner][ratio][metric]
                cell[name] = mean_and_se(
                    [j["table"][corner][ratio][metric] - fixed for j in jobs[HIPP]]
                )
            claims[f"{metric} at {ratio}, {corner} corner, points over"] = cell
    return claims


def _paired(jobs: Jobs, size: StudySize) -> dict[str, Any]:
    """hipp minus Sensitivity on the same questions of the test split [points], over fits.

    Returns:
        One `Estimate` per metric and ratio. Its standard error is that of the questions, resampled
        by picture; the claims' standard error is that of the fits.
    """
    found = {}
    for (corner, metric), task, n in zip(
        METRIC.items(), ("POPE", "ScienceQA"), size.table_questions, strict=True
    ):
        questions = testbed.questions(task, "test", n)
        truth = np.array([q.answer[0] for q in questions])
        clusters = [q.picture or str(i) for i, q in enumerate(questions)]
        # VLMEvalKit's overall F1 counts a question once for every split that it belongs to.
        splits = np.array([len(q.category.split(",")) for q in questions])
        for ratio in map(str, RATIOS):
            cells = [j["table"][corner][ratio] for j in (*jobs[HIPP], *jobs["sensitivity"])]
            given = np.array([list(cell["answers"][task]) for cell in cells])
            if metric == "F1":
                counts = np.concatenate([(given == "Y") & (truth == "Y"), given != truth])
                counts, statistic = splits * counts, _f1
            else:
                counts, statistic = np.concatenate([given == truth, np.ones((1, n))]), _accuracy
            estimate = bootstrap_estimate(counts.T, clusters, statistic)
            found[f"{metric} at {ratio}, {corner} corner"] = dataclasses.asdict(estimate)
    return found


def _f1(sums: np.ndarray) -> np.ndarray:
    return _difference_to_last(f1_percent(*np.split(sums, 2, axis=-1)))


def _accuracy(sums: np.ndarray) -> np.ndarray:
    return _difference_to_last(100 * sums[..., :-1] / sums[..., -1:])


def _difference_to_last(values: np.ndarray) -> np.ndarray:
    return values[..., :-1].mean(-1) - values[..., -1]


def print_table(methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Hypervolume, then each corner's metric by pruning_ratio."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title="on the test split: mean ± standard error over seeds", box=SIMPLE_HEAD)
    columns = ["", "hypervolume", "s"] + [f"{m} {r}" for m in METRIC.values() for r in RATIOS]
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for name, row in sorted(methods.items(), key=lambda item: -item[1]["hypervolume"]["mean"]):
        cells = [_cell(row["hypervolume"], 4), f"{row['seconds']['mean']:.0f}"]
        cells += [_cell(row["table"][corner][str(r)], 1) for corner in METRIC for r in RATIOS]
        table.add_row(name, *cells)
    Console(width=max(200, Console().width), markup=False).print(table)


def _cell(value: Mapping[str, Any] | None, digits: int) -> str:
    if value is None:
        return "-"
    error = "" if value["se"] is None else f" ± {value['se']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{error}"


def _picture(methods: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Hypervolume as bars; each corner's metric against pruning_ratio."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.6), layout="constrained", facecolor="white")
    bars, *panels = figure.subplots(1, 3)
    ranked = sorted(methods.items(), key=lambda item: item[1]["hypervolume"]["mean"])
    colours = {n: "#999" for n in methods} | dict.fromkeys(SEARCHES, "#4c72b0")
    colours |= {n: "#dd8452" for n in methods if n.startswith("hipp")} | {HIPP: "#c44e52"}
    bars.barh(
        [n for n, _ in ranked],
        [r["hypervolume"]["mean"] for _, r in ranked],
        color=[colours[n] for n, _ in ranked],
        xerr=[r["hypervolume"]["se"] or 0 for _, r in ranked],
        error_kw={"lw": 0.8},
    )
    bars.set_xlim(left=0.9 * min(r["hypervolume"]["mean"] for _, r in ranked))
    bars.set_xlabel("hypervolume on the test split")
    shown = [HIPP, UNTRAINED, *INFORMED, "EvoPress", "CMA-ES", "TPE"]
    shown += ["sensitivity", "flap", "uniform"]
    others = [f"C{i}" for i in range(10) if i != 3]  # without red, which is hipp's
    lines = dict(zip(shown, ["#c44e52", *others], strict=True))
    for axes, (corner, metric) in zip(panels, METRIC.items(), strict=True):
        for name in (n for n in shown if n in methods):
            points = [(r, c) for r in RATIOS if (c := methods[name]["table"][corner][str(r)])]
            axes.errorbar(
                [r for r, _ in points],
                [c["mean"] for _, c in points],
                yerr=[c["se"] or 0 for _, c in points],
                marker="o",
                ms=3,
                color=lines[name],
                lw=2.4 if name == HIPP else 1.1,
                label=name,
                capsize=2,
                zorder=3 if name == HIPP else 2,
            )
        searched = [n for n in shown if n in (HIPP, *SEARCHES) and n in methods]
        cells = [methods[n]["table"][corner][str(r)] for n in searched for r in RATIOS]
        # Curves that fall further leave the picture.
        axes.set_ylim(bottom=min(c["mean"] for c in cells if c) - 3)
        axes.set_xlabel("pruning_ratio")
        axes.set_ylabel(f"{'POPE F1' if metric == 'F1' else metric} [%], {corner} corner")
    panels[0].legend(fontsize=7)
    return figure
