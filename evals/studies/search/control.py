"""Does the preference steer?

Similar preferences get plans that differ by thousandths. Therefore this study asks more questions
than the comparison of methods, in the fit and on the test split. The search study reports the same
figures with its own number of questions.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import moocore
import numpy as np
import typer

from hipp_ext.evals.studies.measuring import (
    Save,
    keep_picture,
    mean_and_se,
    rank_correlation,
    report,
    run_command,
)
from hipp_ext.evals.studies.search.study import HIPP, StudySize, run_study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OBJECTIVES = ("utility", "robustness", "compression")
LABELS = ("utility (margin on ScienceQA)", "robustness (margin on POPE)", "parameters removed [%]")


def run(
    size: StudySize, folder: Path, *, processes: int | None = None, save: bool = False
) -> dict[str, Any]:
    """Fit once per seed and query each planner with 66 preferences; also draws control.png."""
    jobs = run_study(
        size, folder, [(HIPP, seed) for seed in range(size.seeds)], processes=processes
    )
    values = {
        "size": dataclasses.asdict(size),
        "control": steering(jobs),
        "hypervolume": mean_and_se([j["hypervolume"]["test"] for j in jobs]),
    }
    result = report("control", values, save)
    lattices = [j["control"]["policy"]["lattice"] for j in jobs]
    keep_picture("control", _picture(lattices), save=save, folder=folder)
    return result


def steering(jobs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How well preferences steer the policy's answers, and the best evaluated plans, over fits."""
    return {who: _steering([j["control"][who] for j in jobs]) for who in jobs[0]["control"]}


def _steering(controls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    along: dict[str, list[float]] = {}
    swings: dict[str, dict[str, list[float]]] = {}
    nondominated, distinct, distinct_nondominated, removed = [], [], [], []
    for control in controls:
        weights = np.array([w for w, _ in control["lattice"]])
        objectives = np.array([o for _, o in control["lattice"]])
        for one, other in itertools.combinations(range(3), 2):
            on = _edge(weights, one, other)
            for axis in (one, other):
                name = f"{OBJECTIVES[one]}-{OBJECTIVES[other]} edge: {OBJECTIVES[axis]}"
                along.setdefault(name, []).append(
                    rank_correlation(weights[on, axis], objectives[on, axis])
                )
        for ratio, edge in control["edges"].items():
            weight, reached = np.array([w for w, _ in edge]), np.array([o for _, o in edge])
            for axis, sign in ((0, 1), (1, -1)):
                name = f"utility-robustness edge at {ratio}: {OBJECTIVES[axis]}"
                along.setdefault(name, []).append(rank_correlation(sign * weight, reached[:, axis]))
            for metric, swing in control["swings"][ratio].items():
                swings.setdefault(ratio, {}).setdefault(metric, []).append(swing)
        each = np.unique(objectives, axis=0)
        best = moocore.is_nondominated(objectives, maximise=True, keep_weakly=True)
        nondominated.append(100 * float(np.mean(best)))
        best = moocore.is_nondominated(each, maximise=True)
        distinct_nondominated.append(100 * float(np.mean(best)))
        distinct.append(len(each))
        removed.append(100 * objectives[_edge(weights, 1, 2), 2])
    return {
        "spearman": {name: mean_and_se(values) for name, values in along.items()},
        "lattice_nondominated_percent": mean_and_se(nondominated),
        "lattice_distinct_plans": mean_and_se(distinct),
        "lattice_distinct_nondominated_percent": mean_and_se(distinct_nondominated),
        "removed_percent_from_compression_to_robustness": np.mean(removed, 0).round(1).tolist(),
        "swing_points_utility_minus_robustness_corner": {
            ratio: {metric: mean_and_se(values) for metric, values in swing.items()}
            for ratio, swing in swings.items()
        },
    }


def _edge(weights: np.ndarray, one: int, other: int) -> np.ndarray:
    """Indices of preferences with weight on two objectives only, from all `other` to all `one`."""
    on = np.flatnonzero(weights[:, 3 - one - other] == 0)
    return on[np.argsort(weights[on, one])]


def _picture(lattices: Sequence[Sequence[Any]]) -> "Figure":
    """Objectives reached along each edge of the simplex, one line per fit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.2), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 3)
    for axes, (one, other) in zip(panels, itertools.combinations(range(3), 2), strict=True):
        for lattice in lattices:
            weights, reached = (np.array(column) for column in zip(*lattice, strict=True))
            on = _edge(weights, one, other)
            x, y = (reached[on, axis] * (100 if axis == 2 else 1) for axis in (other, one))
            axes.plot(x, y, color="#bbb", lw=0.8, zorder=1)
            dots = axes.scatter(x, y, c=weights[on, one], cmap="viridis", s=18, zorder=2)
        axes.set_xlabel(LABELS[other])
        axes.set_ylabel(LABELS[one])
        axes.set_title(
            f"preferences for {OBJECTIVES[one]} and {OBJECTIVES[other]} only", fontsize=10
        )
    figure.colorbar(dots, ax=panels, label="weight of the objective on the vertical axis")
    return figure


def main(
    out: Annotated[Path, typer.Option(help="Folder of finished fits.")] = Path("control"),
    seeds: Annotated[int, typer.Option(min=1, help="Number of fits.")] = 5,
    evaluations: Annotated[int, typer.Option(min=12, help="Plans each fit may evaluate.")] = 300,
    questions: Annotated[
        tuple[int, int],
        typer.Option(min=8, metavar="N N", help="POPE and ScienceQA questions, search split."),
    ] = (4096, 1024),
    test_questions: Annotated[
        tuple[int, int],
        typer.Option(min=8, metavar="N N", help="POPE and ScienceQA questions, test split."),
    ] = (4800, 1600),
    processes: Annotated[int | None, typer.Option(min=1, help="Default: one per core.")] = None,
    save: Save = False,
) -> None:
    """Measure how well preferences steer: fits, 66 preferences each, and their plans' figures.

    The study takes some 90 minutes on two cores; an interrupted study continues.

    Examples:

    `python -m hipp_ext.evals.studies.search.control --out control`

    `python -m hipp_ext.evals.studies.search.control --seeds 1 --evaluations 60 --questions 64 32
    --test-questions 300 200 --out quick`
    """
    size = StudySize(
        seeds=seeds, evaluations=evaluations, questions=questions, table_questions=test_questions
    )
    run(size, out, processes=processes, save=save)


if __name__ == "__main__":
    run_command(main)
