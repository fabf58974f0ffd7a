"""A fit in one process or several, all of which get the result."""

import copy
from pathlib import Path
from typing import Any

from torch import nn

from hipp_ext.budget import Bounds
from hipp_ext.planner.cost import CostKind, cost_of
from hipp_ext.planner.evaluation import Workers, plan_rewards
from hipp_ext.planner.fit import Trainer
from hipp_ext.planner.history import FitHistory
from hipp_ext.planner.policy import Policy
from hipp_ext.planner.reward import Evaluator
from hipp_ext.planner.settings import FitResult, FitSettings
from hipp_ext.planner.state import Signals


def run_fit(
    policy: Policy,
    model: nn.Module,
    evaluator: Evaluator,
    signals: Signals,
    settings: FitSettings,
    workers: Workers,
    *,
    cost: CostKind,
    bounds: Bounds,
    pruning_ratio: float | None,
    folder: Path | None,
    mrs: str | None,
    progress: bool,
) -> tuple[Policy, FitHistory, FitResult]:
    """(fitted policy, history, result), the same in all processes; `policy` is left as it was."""
    policy, digest = copy.deepcopy(policy), getattr(evaluator, "digest", None)
    price, learned = cost_of(signals.groups, cost), None
    with plan_rewards(model, evaluator, signals, price) as measure_one:
        if not workers.leads:
            workers.serve(measure_one)
        else:
            with workers.leading(measure_one) as measure_many:
                whole = measure_many([tuple(g.width for g in signals.groups)])[0]
                dense = {"utility": whole.utility, "robustness": whole.robustness}
                trainer = Trainer(
                    policy,
                    signals,
                    measure_many,
                    settings,
                    cost=price,
                    pruning_ratio=pruning_ratio,
                    bounds=bounds,
                    folder=folder,
                    dense=dense,
                    evaluator=digest,
                    mrs=mrs,
                    at_once=workers.count,
                )
                result = trainer.run(progress)
                learned = (policy.state_dict(), trainer.archive.records, dense, result)
    shared: Any = workers.share(learned)
    state, records, dense, result = shared
    policy.load_state_dict(state)
    history = FitHistory(
        records=records, ranking=signals.ranking, cost=cost, dense=dense, evaluator=digest
    )
    return policy, history, result
