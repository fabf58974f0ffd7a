"""Does synaptic flow tell plans that break the model from those that do not, at one budget?"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hipp_ext.allocators.cheapest import expected_losses, task_losses
from hipp_ext.budget import Bounds, keep_counts
from hipp_ext.evals.statistics import binomial_se
from hipp_ext.evals.studies.measuring import rank_correlation
from hipp_ext.evals.studies.smolworld.questions.rules import ERRORS, Answer, Finding
from hipp_ext.evals.studies.smolworld.table.bench import Bench
from hipp_ext.evals.studies.smolworld.table.cells import CHIEF
from hipp_ext.evals.studies.smolworld.table.rewards import kept_rewards
from hipp_ext.evals.studies.smolworld.table.searching import start_logits
from hipp_ext.planner import Signals
from hipp_ext.planner.evaluation import KeepCounts
from hipp_ext.scorers import SynFlow
from hipp_ext.units import top_units

# Of the planner's allocation logits. Nearly all plans around equal fractions (0) break the model,
# and none of those around the planner's (1).
SHARES = (0.2, 0.4, 0.6, 0.8)
SPREAD = 1.0  # of the allocation logits around that
COLLAPSED = 0.5  # of the dense margin: below it a plan has collapsed
FALSE_ALARMS = 0.05  # of the sound plans, at most, that a threshold rejects
FEWEST = 5  # plans of either kind


def collapse(bench: Bench, plans: int, folder: Path) -> Finding:
    """Question d: random plans of one ratio, measured on the validation split.

    Args:
        bench: the model.
        plans: number of plans.
        folder: folder of the plans that were measured; an interrupted measurement goes on.
    """
    signals = bench.quick_signals
    counts = random_plans(signals, plans)
    dense = bench.validation(bench.quick)
    sound = (dense["utility"] + dense["robustness"]) / 2
    margins = np.array(_measured(bench, counts, folder))
    flow = np.array(flow_left(bench, counts))
    losses = task_losses(signals.sensitivity, 0.5)
    predicted = -expected_losses(signals.groups, np.array(counts), losses)
    caught = {
        name: caught_share(score, margins < COLLAPSED * sound)
        for name, score in (("synaptic flow", flow), ("sensitivity", predicted))
    }
    broken = int((margins < COLLAPSED * sound).sum())
    share = caught["synaptic flow"]
    return Finding(
        question="Does the SynFlow term catch collapse?",
        rule=(
            f"{plans} plans of {CHIEF:.0%}, drawn between equal fractions and the untrained "
            "planner's plan, on the validation split; collapsed are those that keep less than "
            f"{COLLAPSED:.0%} of the dense margin. A threshold on the flow that is left rejects "
            f"at most {FALSE_ALARMS:.0%} of the sound plans. yes: it rejects more "
            f"than half of the collapsed ones, by more than {ERRORS:g} standard errors. no: fewer "
            f"than half, by as many. With fewer than {FEWEST} plans of either kind nothing is "
            "shown."
        ),
        answer=_answer(share, broken, plans - broken),
        figures={
            "collapsed plans": broken,
            "sound plans": plans - broken,
            "collapsed plans that synaptic flow rejects [%]": share,
            "collapsed plans that sensitivity rejects [%]": caught["sensitivity"],
            "Spearman of flow and margin": round(rank_correlation(flow, margins), 3),
            "Spearman of sensitivity and margin": round(rank_correlation(predicted, margins), 3),
        },
    )


def random_plans(signals: Signals, plans: int) -> list[KeepCounts]:
    """Keep counts of plans of one ratio, less and more near to the planner's in turn."""
    rng, groups = np.random.default_rng(0), signals.groups
    start = start_logits(signals, CHIEF)
    return [
        keep_counts(
            groups,
            (SHARES[n % len(SHARES)] * start + SPREAD * rng.standard_normal(len(groups))).tolist(),
            CHIEF,
            Bounds(),
        )
        for n in range(plans)
    ]


def flow_left(bench: Bench, plans: Sequence[KeepCounts]) -> list[float]:
    """Sum over the groups of the log of the flow at their depth that a plan leaves, 0 for dense."""
    signals = bench.quick_signals
    shares = SynFlow()(bench.dense, groups=signals.groups)
    found = []
    for plan in plans:
        left = 0.0
        for group, keep in zip(signals.groups, plan, strict=True):
            kept = torch.tensor(top_units(signals.scores[group.name], keep, group.sections))
            gone = float(shares[group.name].sum() - shares[group.name][kept.long()].sum())
            left += float(np.log(max(1e-9, 1 - gone)))
        found.append(left)
    return found


def caught_share(score: np.ndarray, collapsed: np.ndarray) -> float | None:
    """Share [%] of the collapsed plans below a threshold that rejects at most FALSE_ALARMS of the
    others; None where there are none of either kind."""
    if not collapsed.any() or collapsed.all():
        return None
    threshold = np.quantile(score[~collapsed], FALSE_ALARMS, method="lower")
    return round(100 * float((score[collapsed] < threshold).mean()), 1)


def _answer(share: float | None, broken: int, sound: int) -> Answer:
    if share is None or min(broken, sound) < FEWEST:
        return "not shown"
    error = ERRORS * binomial_se(50, broken)  # of one in two, which the share is compared to
    if share - error > 50:
        return "yes"
    return "no" if share + error < 50 else "not shown"


def _measured(bench: Bench, plans: Sequence[KeepCounts], folder: Path) -> list[float]:
    """The mean margin of both tasks of each plan."""
    signals, title = bench.quick_signals, "random plans"
    with kept_rewards(
        bench, bench.validation, signals, folder, title=title, plans=len(plans)
    ) as reward:
        rewards = [reward(plan) for plan in plans]
    return [(own.utility + own.robustness) / 2 for own in rewards]
