"""`hipp bench testbed`: what the testbed's model knows, and what uniform pruning takes from it, on the test split.

Units are ranked by WandaSP and removed without recovery. "Uniform" gives every group the same share, with the budget met
exactly in parameters; in the other rows one kind of group loses the share and the other stays whole.
"""

from typing import Any

from hipp_ext import testbed
from hipp_ext.budget import keep_counts
from hipp_ext.evals.evaluator import Evaluator
from hipp_ext.evals.pope import pope_scores
from hipp_ext.evals.studies.measuring import report
from hipp_ext.groups import find_groups
from hipp_ext.scorers import WandaSP
from hipp_ext.surgery.masks import masked
from hipp_ext.units import plan_from_counts

ROWS: dict[
    str, tuple[float, str | None]
] = {  # name -> (share removed, the only kind that loses anything)
    "dense": (0.0, None),
    "uniform 10%": (0.1, None),
    "uniform 20%": (0.2, None),
    "uniform 30%": (0.3, None),
    "attention only, 30%": (0.3, "attention"),
    "FFN only, 30%": (0.3, "ffn"),
}


def run(save: bool = False) -> dict[str, Any]:
    """Measure every row; returns and prints the result. Accuracies in percent, standard errors in points."""
    model, processor = testbed.load()
    pope, choice = testbed.questions("POPE", "test"), testbed.questions("ScienceQA", "test")
    evaluator = Evaluator(model, processor, pope, choice)
    groups = find_groups(model)
    scores = WandaSP()(model, testbed.calibration_batches(processor))
    rows = {}
    for name, (share, only) in ROWS.items():
        if only is None:
            counts = keep_counts(groups, None, share)
        else:
            counts = tuple(
                g.width - round(share * g.width) if g.kind == only else g.width for g in groups
            )
        plan = plan_from_counts(groups, counts, scores)
        with masked(model, plan):
            measured = evaluator.scores(model)
        images = [str(q.scene) for q in pope]
        by_split = pope_scores(
            measured["pope"].answers, [q.answer for q in pope], [q.category for q in pope], images
        )["vlmeval"]
        rows[name] = {
            "pruning_ratio": plan.pruning_ratio,
            "ScienceQA": [measured["choice"].accuracy, measured["choice"].accuracy_se],
            **{f"POPE {s}": [v.accuracy, v.accuracy_se] for s, v in by_split.items()},
            "POPE yes_rate": by_split["overall"].yes_rate,
        }
    values = {"rows": rows, "questions": {"POPE": len(pope), "ScienceQA": len(choice)}}
    return report("testbed", "hipp bench testbed", values, save)
