"""A fit in one process or several, all of which get the result."""

import contextlib
import copy
import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from hipp_ext.budget import Bounds
from hipp_ext.planner.cost import CostKind, cost_of
from hipp_ext.planner.evaluation import Workers, plan_rewards
from hipp_ext.planner.fit import Trainer
from hipp_ext.planner.history import FitHistory
from hipp_ext.planner.policy import Policy
from hipp_ext.planner.reward import Evaluator, scores_agree
from hipp_ext.planner.settings import FitResult, FitSettings
from hipp_ext.planner.state import Signals
from hipp_ext.runs import RunFolder


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
                identity = {
                    # More steps may be asked for later.
                    "settings": dataclasses.asdict(dataclasses.replace(settings, steps=0)),
                    "pruning_ratio": pruning_ratio,
                    "bounds": dataclasses.asdict(bounds),
                    "cost": cost,
                    "mrs": mrs,
                    "scorer": signals.scorer,
                    "model": signals.digest,
                    "calibration": signals.calibration,
                    "evaluator": digest,
                    "dense": dense,  # stands for the questions of an evaluator without a digest
                }
                with _run_folder(folder, identity) as run:
                    trainer = Trainer(
                        policy,
                        signals,
                        measure_many,
                        settings,
                        cost=price,
                        pruning_ratio=pruning_ratio,
                        bounds=bounds,
                        run=run,
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


def _run_folder(
    folder: Path | None, identity: dict[str, Any]
) -> contextlib.AbstractContextManager[RunFolder | None]:
    """The folder of the fit, locked until it ends; None: nothing is kept."""
    if folder is None:
        return contextlib.nullcontext()
    return RunFolder(folder, identity, same={"dense": scores_agree})
