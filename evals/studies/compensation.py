"""`hipp bench compensation`: what compensation gives back to uniformly pruned testbed models, on the test split.

Both sides of a row share the plan and the questions, so the gain is a paired difference; its standard error, like the
others, counts pictures (each ScienceQA question is a cluster of its own).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hipp_ext import testbed
from hipp_ext.budget import keep_counts
from hipp_ext.evals.evaluator import Evaluator
from hipp_ext.evals.statistics import clustered_se
from hipp_ext.evals.studies.measuring import report
from hipp_ext.groups import find_groups
from hipp_ext.scorers import FLAP, WandaSP
from hipp_ext.surgery.prune import prune
from hipp_ext.units import plan_from_counts

RATIOS = (0.2, 0.3, 0.4)
SIDES = ("sliced", "compensated")


def run(save: bool = False) -> dict[str, Any]:
    """Measure every row; prints a table and returns the result. Accuracies in percent, standard errors in points."""
    model, processor = testbed.load()
    pope, choice = testbed.questions("POPE", "test"), testbed.questions("ScienceQA", "test")
    evaluator = Evaluator(model, processor, pope, choice)
    groups = find_groups(model)
    rows = {}
    for scorer in (WandaSP(), FLAP()):
        scores = scorer(model, processor=processor)
        for ratio in RATIOS:
            plan = plan_from_counts(groups, keep_counts(groups, None, ratio), scores)
            answers = {}
            for side in SIDES:
                small = prune(model, plan, reconstruct=side == "compensated", processor=processor)
                answers[side] = evaluator.scores(small)
            rows[f"{scorer.name} {100 * ratio:.0f}%"] = {
                "pruning_ratio": plan.pruning_ratio,
                "ScienceQA": _compare(choice, {s: a["choice"].answers for s, a in answers.items()}),
                "POPE overall": _compare(pope, {s: a["pope"].answers for s, a in answers.items()}),
            }
    _print_table(rows)
    values = {"rows": rows, "questions": {"POPE": len(pope), "ScienceQA": len(choice)}}
    return report("compensation", "hipp bench compensation", values, save)


def _compare(
    questions: Sequence[testbed.Question], answers: Mapping[str, Sequence[str]]
) -> dict[str, list[float]]:
    """Side, and "gain" -> [accuracy or difference, its standard error]."""
    # As POPE counts: a question that belongs to three splits stands in the overall figure three times.
    weight = np.array([1 if q.options else len(q.category.split(",")) for q in questions])
    pictures = [str(q.index if q.options else q.scene) for q in questions]
    truth = np.array([q.answer for q in questions])
    right = {side: (np.array(said) == truth).astype(float) for side, said in answers.items()}
    right["gain"] = right["compensated"] - right["sliced"]
    return {side: _mean(r, weight, pictures) for side, r in right.items()}


def _mean(values: np.ndarray, weight: np.ndarray, clusters: Sequence[str]) -> list[float]:
    def share(sums: np.ndarray) -> np.ndarray:
        return 100 * sums[..., :1] / sums[..., 1:]

    counts = np.stack([weight * values, weight], axis=1)
    return [share(counts.sum(0)).item(), clustered_se(counts, clusters, share).item()]


def _print_table(rows: Mapping[str, Mapping[str, Any]]) -> None:
    tasks = ("ScienceQA", "POPE overall")
    print(
        f"{'plan':14}"
        + "".join(f"{f'{task} {side}':>26}" for task in tasks for side in (*SIDES, "gain"))
    )
    for name, row in rows.items():
        cells = [row[task][side] for task in tasks for side in (*SIDES, "gain")]
        print(
            f"{name:14}" + "".join(f"{f'{value:.1f} ± {error:.1f}':>26}" for value, error in cells)
        )
