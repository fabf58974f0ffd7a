"""What the testbed's model knows, and what uniform pruning takes from it, on the test split.

Units are ranked by WandaSP and removed without recovery. "Uniform" removes the same fraction of
every group, with the budget met exactly in parameters; in the other rows one kind of group loses
that fraction and the other kind stays whole.
"""

from typing import Any

from hipp_ext import testbed
from hipp_ext.budget import keep_counts
from hipp_ext.evals.evaluator import Evaluator
from hipp_ext.evals.studies.measuring import Save, pope_by_split, report, run_command
from hipp_ext.groups import find_groups
from hipp_ext.scorers import WandaSP
from hipp_ext.surgery.masks import masked
from hipp_ext.units import plan_from_counts

# Name -> (fraction removed, the only kind of group that is pruned).
ROWS: dict[str, tuple[float, str | None]] = {
    "dense": (0.0, None),
    "uniform 10%": (0.1, None),
    "uniform 20%": (0.2, None),
    "uniform 30%": (0.3, None),
    "attention only, 30%": (0.3, "attention"),
    "FFN only, 30%": (0.3, "ffn"),
}


def run(save: Save = False) -> dict[str, Any]:
    """Measure the testbed's model, dense and uniformly pruned, on its test split.

    Accuracies are in percent, standard errors in percentage points.

    Example: `python -m hipp_ext.evals.studies.testbed_table`
    """
    model, processor = testbed.load()
    pope, choice = testbed.questions("POPE", "test"), testbed.questions("ScienceQA", "test")
    evaluator = Evaluator(model, processor, pope, choice)
    groups = find_groups(model)
    scores = WandaSP()(model, testbed.calibration_batches(processor))
    rows = {}
    for name, (fraction, only) in ROWS.items():
        if only is None:
            counts = keep_counts(groups, None, fraction)
        else:
            counts = tuple(
                g.width - round(fraction * g.width) if g.kind == only else g.width for g in groups
            )
        plan = plan_from_counts(groups, counts, scores)
        with masked(model, plan):
            measured = evaluator.scores(model)
        by_split = pope_by_split(measured, pope)
        rows[name] = {
            "pruning_ratio": plan.pruning_ratio,
            "ScienceQA": [measured["choice"].accuracy, measured["choice"].accuracy_se],
            **{f"POPE {s}": [v.accuracy, v.accuracy_se] for s, v in by_split.items()},
            "POPE yes_rate": by_split["overall"].yes_rate,
        }
    values = {"rows": rows, "questions": {"POPE": len(pope), "ScienceQA": len(choice)}}
    return report("testbed", values, save)


if __name__ == "__main__":
    run_command(run)
