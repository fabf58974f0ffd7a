"""What least-squares reconstruction restores in uniformly pruned testbed models, on the test split.

Both sides of a row share the plan and the questions, so the gain is a paired difference. Standard
errors are clustered by picture; each ScienceQA question is a cluster of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hipp_ext import testbed
from hipp_ext.budget import keep_counts
from hipp_ext.evals.evaluator import Evaluator
from hipp_ext.evals.statistics import clustered_se
from hipp_ext.evals.studies.measuring import Save, report, run_command
from hipp_ext.groups import find_groups
from hipp_ext.scorers import FLAP, WandaSP
from hipp_ext.surgery.prune import prune
from hipp_ext.units import plan_from_counts

RATIOS = (0.2, 0.3, 0.4)
SIDES = ("sliced", "reconstructed")


def run(save: Save = False) -> dict[str, Any]:
    """Compare pruned testbed models with and without reconstruction on the test split.

    Accuracies are in percent, standard errors in percentage points.

    Example: `python -m hipp_ext.evals.studies.reconstruction`
    """
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
                small = prune(model, plan, reconstruct=side == SIDES[1], processor=processor)
                answers[side] = evaluator.scores(small)
            rows[f"{scorer.name} {100 * ratio:.0f}%"] = {
                "pruning_ratio": plan.pruning_ratio,
                "ScienceQA": _compare(choice, {s: a["choice"].answers for s, a in answers.items()}),
                "POPE overall": _compare(pope, {s: a["pope"].answers for s, a in answers.items()}),
            }
    _print_table(rows)
    values = {"rows": rows, "questions": {"POPE": len(pope), "ScienceQA": len(choice)}}
    return report("reconstruction", values, save)


def _compare(
    questions: Sequence[testbed.Question], answers: Mapping[str, Sequence[str]]
) -> dict[str, list[float]]:
    """Side, and "gain" -> [accuracy or difference, its standard error]."""
    # POPE's overall figure counts a question once for every split that it belongs to.
    weight = np.array([1 if q.options else len(q.category.split(",")) for q in questions])
    pictures = [str(q.index if q.options else q.scene) for q in questions]
    truth = np.array([q.answer for q in questions])
    correct = {side: (np.array(given) == truth).astype(float) for side, given in answers.items()}
    correct["gain"] = correct["reconstructed"] - correct["sliced"]
    return {side: _mean(c, weight, pictures) for side, c in correct.items()}


def _mean(values: np.ndarray, weight: np.ndarray, clusters: Sequence[str]) -> list[float]:
    def percent(sums: np.ndarray) -> np.ndarray:
        return 100 * sums[..., :1] / sums[..., 1:]

    counts = np.stack([weight * values, weight], axis=1)
    return [percent(counts.sum(0)).item(), clustered_se(counts, clusters, percent).item()]


def _print_table(rows: Mapping[str, Mapping[str, Any]]) -> None:
    columns = [(t, s) for t in ("ScienceQA", "POPE overall") for s in (*SIDES, "gain")]
    print(f"{'plan':14}" + "".join(f"{f'{task} {side}':>26}" for task, side in columns))
    for name, row in rows.items():
        cells = [f"{row[t][s][0]:.1f} ± {row[t][s][1]:.1f}" for t, s in columns]
        print(f"{name:14}" + "".join(f"{cell:>26}" for cell in cells))


if __name__ == "__main__":
    run_command(run)
