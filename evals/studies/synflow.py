"""`hipp bench synflow`: does the synaptic-flow proxy foretell collapse, at equal budget?

Random allocations at fixed ratios are evaluated on the testbed's search split. Within a ratio, the rank correlation of
stability with what was measured says whether the proxy tells allocations apart (between ratios it only counts parameters). As a
gate: of the plans that collapsed, how many would it turn away, at the threshold that turns away 5% of the sound ones.
"""

from typing import Any

import numpy as np

from hipp_ext import testbed
from hipp_ext.budget import keep_counts
from hipp_ext.evals.demo import search_evaluator
from hipp_ext.evals.studies.measuring import rank_correlation, report
from hipp_ext.planner import HiPPPlanner
from hipp_ext.planner.cost import measure_cost
from hipp_ext.planner.evaluation import plan_rewards
from hipp_ext.preference import Preference

RATIOS = (0.2, 0.3, 0.4, 0.5)
COLLAPSED = 0.25  # mean of both margins below this: little better than guessing
FALSE_ALARMS = 0.05


def run(plans: int = 60, save: bool = False) -> dict[str, Any]:
    """Measure on the testbed; returns and prints the result."""
    model, processor = testbed.load()
    signals = HiPPPlanner(Preference(1, 1, 1)).measure(model, processor=processor)
    evaluator, rng = search_evaluator(model, processor, 128), np.random.default_rng(0)
    cost = measure_cost(model, signals.groups, "parameters")
    stability, sound, rows = [], [], {}
    with plan_rewards(model, evaluator, signals, cost) as measure:
        for ratio in RATIOS:
            allocations = rng.standard_normal((plans, len(signals.groups)))
            rewards = [measure(keep_counts(signals.groups, a.tolist(), ratio)) for a in allocations]
            flow = [r.stability for r in rewards]
            quality = [(r.utility + r.robustness) / 2 for r in rewards]
            rows[str(ratio)] = {
                name: rank_correlation(flow, values)
                for name, values in (
                    ("utility", [r.utility for r in rewards]),
                    ("robustness", [r.robustness for r in rewards]),
                    ("mean", quality),
                )
            } | {"collapsed": sum(q < COLLAPSED for q in quality)}
            stability += flow
            sound += [q >= COLLAPSED for q in quality]
    flow, fine = np.array(stability), np.array(sound)
    threshold = float(np.quantile(flow[fine], FALSE_ALARMS))
    values = {
        "plans_per_ratio": plans,
        "spearman_with_stability": rows,
        "collapsed": int((~fine).sum()),
        "gate": {
            "threshold": threshold,
            "sound_turned_away": float((flow[fine] < threshold).mean()),
            "collapsed_turned_away": float((flow[~fine] < threshold).mean())
            if (~fine).any()
            else None,
        },
    }
    return report("synflow", "hipp bench synflow", values, save)
