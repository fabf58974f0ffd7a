"""`hipp bench evaluation`: what it costs to switch from plan to plan, and to evaluate one, against really pruned models.

Both sides in one run, taking turns: the same questions are answered by the sliced model and by the model that `prune` makes.
"""

from typing import Any

import numpy as np
import torch

from hipp_ext import testbed
from hipp_ext.answers import AnswerLogits
from hipp_ext.budget import keep_counts
from hipp_ext.calibration import encode
from hipp_ext.evals.demo import search_evaluator
from hipp_ext.evals.studies.measuring import paired_times, ratio, report
from hipp_ext.groups import find_groups
from hipp_ext.scorers import WandaSP
from hipp_ext.surgery.masks import masked
from hipp_ext.surgery.prune import prune
from hipp_ext.surgery.slices import sliced
from hipp_ext.units import plan_from_counts

RATIO = 0.4


def run(repeats: int = 7, save: bool = False) -> dict[str, Any]:
    """Measure on the testbed; returns and prints the result."""
    model, processor = testbed.load()
    groups = find_groups(model)
    scores = WandaSP()(model, testbed.calibration_batches(processor))
    evaluator = search_evaluator(model, processor, 192)
    rng = np.random.default_rng(0)
    plans = [
        keep_counts(groups, rng.standard_normal(len(groups)).tolist(), RATIO)
        for _ in range(repeats + 1)
    ]
    small = prune(model, plan_from_counts(groups, plans[0], scores))
    sides: dict[str, Any] = {"pruned": lambda: evaluator(small), "dense": lambda: evaluator(model)}
    times = paired_times(sides, repeats)
    with sliced(model, groups, scores) as shrink:

        def switch() -> None:
            for counts in plans:
                shrink(counts)

        def evaluate() -> None:
            shrink(plans[0])
            evaluator(model)

        both = paired_times(
            {"sliced": evaluate, "pruned": lambda: evaluator(small), "switch": switch}, repeats
        )
    plan = plan_from_counts(groups, plans[0], scores)
    with masked(model, plan):
        times |= paired_times({"masked": lambda: evaluator(model)}, repeats)
    switching = [t / len(plans) for t in both["switch"]]
    values = {
        "pruning_ratio": RATIO,
        "questions": {"POPE": 192, "ScienceQA": 192},
        "sliced_over_pruned": ratio(both, "sliced", "pruned"),
        "switch_share_of_evaluation": ratio(
            {"switch": switching, "sliced": both["sliced"]}, "switch", "sliced"
        ),
        "dense_over_pruned": ratio(times, "dense", "pruned"),
        "masked_over_pruned": ratio(times | {"pruned": both["pruned"]}, "masked", "pruned"),
        "replayed_over_shared": _sharing(model, processor, repeats),
    }
    return report("evaluation_cost", "hipp bench evaluation", values, save)


def _sharing(model: torch.nn.Module, processor: Any, repeats: int) -> dict[str, float]:
    """POPE's questions, six a picture: every row in full, against the common beginnings once."""
    questions = testbed.questions("POPE", "search", 192)
    batches = [
        encode(
            processor,
            [q.prompt for q in questions[i : i + 64]],
            [q.image for q in questions[i : i + 64]],
        )
        for i in range(0, len(questions), 64)
    ]
    shared, replayed = AnswerLogits(model, batches), AnswerLogits(model, batches, share=False)
    times = paired_times(
        {"shared": lambda: shared(model), "replayed": lambda: replayed(model)}, repeats
    )
    return ratio(times, "replayed", "shared")
