"""One budget over vision tower, projector and language tower, against the language tower alone.

Both sides remove the same number of parameters of the testbed's model, from a plan by Fisher or
anchored sensitivity on the same calibration, without recovery, and answer the same questions of the
test split. A gain is a paired difference, averaged over draws of the calibration; its standard
error is that over questions, clustered by picture (each ScienceQA question is a cluster of its
own). An interrupted study goes on in its folder.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from hipp_ext import PruningPlan, testbed
from hipp_ext.allocators import Sensitivity
from hipp_ext.budget import Bounds
from hipp_ext.evals.evaluator import Evaluator
from hipp_ext.evals.statistics import clustered_se
from hipp_ext.evals.studies.measuring import Save, report, run_command
from hipp_ext.files import write_atomic
from hipp_ext.groups import Tower, find_groups, total_parameters
from hipp_ext.runs import RunFolder
from hipp_ext.sensitivity.efforts import Effort
from hipp_ext.surgery.prune import prune

ALL: tuple[Tower, ...] = ("language", "vision", "projector")
SIDES: dict[str, tuple[Tower, ...]] = {"language": ("language",), "all": ALL}
# Method -> effort of the sensitivity, and whether blocks may go.
METHODS: dict[str, tuple[Effort, bool]] = {
    "fisher": ("fisher", False),
    "fisher, blocks may go": ("fisher", True),
    "anchored": ("anchored", False),
}
RATIO = 0.3  # of the prunable parameters of everything
ROWS, BATCH = 64, 16  # of a draw of the calibration
TASKS = {"POPE": "pope", "ScienceQA": "choice"}  # task -> what `Evaluator.scores` calls it


def run(
    seeds: Annotated[int, typer.Option(min=1, help="Draws of the calibration.")] = 3,
    folder: Annotated[
        Path, typer.Option(metavar="DIR", help="Where an interrupted study goes on.")
    ] = Path("out/towers"),
    save: Save = False,
) -> dict[str, Any]:
    """Prune the testbed's model in all towers, and in the language tower alone.

    Accuracies are in percent, standard errors in percentage points.

    Example: `python -m hipp_ext.evals.studies.towers`
    """
    study = _Study()
    with RunFolder(folder, {"study": "towers", "questions": study.evaluator.digest}) as kept:
        records = {
            method: {
                side: [study.record(kept, method, side, s) for s in range(seeds)] for side in SIDES
            }
            for method in METHODS
        }
    values = {
        "pruning_ratio": RATIO,
        "prunable_parameters": study.parameters,
        "draws": seeds,
        "questions": {task: len(asked) for task, asked in study.questions.items()},
        "methods": {m: study.compare(sides) for m, sides in records.items()},
    }
    return report("towers", values, save)


class _Study:
    """The model, its questions, and what is done with them."""

    def __init__(self) -> None:
        self.model, self.processor = testbed.load()
        self.questions = {task: testbed.questions(task, "test") for task in TASKS}
        self.evaluator = Evaluator(self.model, self.processor, *self.questions.values(), towers=ALL)
        self.parameters = total_parameters(find_groups(self.model, ALL))

    def record(self, kept: RunFolder, method: str, side: str, seed: int) -> dict[str, Any]:
        """What a plan removes, and its answers; read, where they were measured before."""
        file = kept / f"{method}-{side}-{seed}.json".replace(" ", "_").replace(",", "")
        if file.is_file():
            return json.loads(file.read_text())
        plan = self.plan(method, SIDES[side], seed)
        scores = self.evaluator.scores(prune(self.model, plan))
        towers: dict[str, float] = {}
        for tower in plan.towers:
            own = [g for g in plan.groups if g.tower == tower]
            parameters = sum(g.width * g.unit_parameters for g in own)
            towers[tower] = 1 - sum(g.keep * g.unit_parameters for g in own) / parameters
        removed = sum((g.width - g.keep) * g.unit_parameters for g in plan.groups)
        record = {
            "removed": removed,
            "removed_fractions": towers,
            "answers": {task: list(scores[name].answers) for task, name in TASKS.items()},
        }
        write_atomic(file, json.dumps(record))
        return record

    def plan(self, method: str, towers: tuple[Tower, ...], seed: int) -> PruningPlan:
        """The plan of a method that removes RATIO of everything from some towers."""
        rows = testbed.calibration_batches(self.processor, (seed + 1) * ROWS, BATCH)
        calibration = rows[-ROWS // BATCH :]
        ratio = RATIO * self.parameters / total_parameters(find_groups(self.model, towers))
        effort, drops = METHODS[method]
        bounds = Bounds(drop="blocks") if drops else None
        allocator = Sensitivity(
            pruning_ratio=ratio, effort=effort, bounds=bounds, seed=seed, towers=towers
        )
        return allocator.plan(self.model, calibration=calibration)

    def compare(self, sides: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """Accuracy of both sides, and the gain, averaged over draws: [value, standard error]."""
        found: dict[str, Any] = {
            "removed": {side: [r["removed"] for r in records] for side, records in sides.items()},
            "removed_fractions": [r["removed_fractions"] for r in sides["all"]],
        }
        for task, asked in self.questions.items():
            truth = np.array([q.answer for q in asked])
            correct = {
                side: np.mean([_right(r, task, truth) for r in records], 0)
                for side, records in sides.items()
            }
            gains = correct["all"] - correct["language"]
            found[task] = {name: _mean(asked, c) for name, c in correct.items()}
            found[task]["gain"] = _mean(asked, gains)
            pairs = zip(sides["all"], sides["language"], strict=True)
            found[task]["gain_per_draw"] = [
                100 * float((_right(a, task, truth) - _right(b, task, truth)).mean())
                for a, b in pairs
            ]
        return found


def _right(record: Mapping[str, Any], task: str, truth: np.ndarray) -> np.ndarray:
    """1 for each answer of a record that is right, else 0."""
    return (np.array(record["answers"][task]) == truth).astype(float)


def _mean(questions: Sequence[testbed.Question], values: np.ndarray) -> list[float]:
    """Mean over questions [%], and its standard error, clustered by picture."""
    # POPE's overall figure counts a question once for every split that it belongs to.
    weight = np.array([1 if q.options else len(q.category.split(",")) for q in questions])
    pictures = [str(q.index if q.options else q.scene) for q in questions]

    def percent(sums: np.ndarray) -> np.ndarray:
        return 100 * sums[..., :1] / sums[..., 1:]

    counts = np.stack([weight * values, weight], axis=1)
    return [percent(counts.sum(0)).item(), clustered_se(counts, pictures, percent).item()]


if __name__ == "__main__":
    run_command(run)
