"""A fit in one process or several, all of which get the result."""

import contextlib
import copy
from pathlib import Path

from torch import nn

from hipp_ext.planner.archive import Archive
from hipp_ext.planner.evaluation import Workers, plan_rewards
from hipp_ext.planner.fit import Trainer
from hipp_ext.planner.history import FitHistory
from hipp_ext.planner.policy import Policy
from hipp_ext.planner.problem import FitProblem
from hipp_ext.planner.reward import Evaluator, scores_agree
from hipp_ext.planner.settings import FitResult
from hipp_ext.runs import RunFolder


def run_fit(
    policy: Policy,
    model: nn.Module,
    evaluator: Evaluator,
    problem: FitProblem,
    workers: Workers,
    folder: Path | None,
    progress: bool,
) -> tuple[Policy, FitHistory, FitResult]:
    """(fitted policy, history, result), the same in all processes; `policy` is left as it was."""
    policy, digest = copy.deepcopy(policy), getattr(evaluator, "digest", None)
    signals, learned = problem.signals, None
    with plan_rewards(model, evaluator, signals, problem.cost) as measure_one:
        if not workers.leads:
            workers.serve(measure_one)
        else:
            with workers.leading(measure_one) as measure_many, contextlib.ExitStack() as stack:
                whole = measure_many([tuple(g.width for g in signals.groups)])[0]
                dense, run = {"utility": whole.utility, "robustness": whole.robustness}, None
                if folder:
                    identity = problem.identity(dense, digest)
                    run = stack.enter_context(
                        RunFolder(folder, identity, same={"dense": scores_agree})
                    )
                trainer = Trainer(policy, problem, measure_many, run, workers.count)
                result = trainer.run(progress)
                learned = (policy.state_dict(), trainer.archive.records, dense, result)
    state, records, dense, result = workers.share(learned)
    policy.load_state_dict(state)
    history = FitHistory(
        archive=Archive(records=records),
        ranking=signals.ranking,
        cost=problem.cost.name,
        dense=dense,
        evaluator=digest,
    )
    return policy, history, result
