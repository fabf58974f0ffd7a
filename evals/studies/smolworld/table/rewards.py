"""Rewards of plans that are measured once: what was measured is kept in a folder."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from hipp_ext.evals.evaluator import Evaluator
from hipp_ext.evals.studies.smolworld.table.bench import Bench
from hipp_ext.files import write_atomic
from hipp_ext.planner import Signals
from hipp_ext.planner.cost import cost_of
from hipp_ext.planner.evaluation import KeepCounts, MeasureOne, plan_rewards
from hipp_ext.planner.reward import Reward
from hipp_ext.progress import progress_bar
from hipp_ext.runs import RunFolder

NAME = "rewards.json"


@contextlib.contextmanager
def kept_rewards(
    bench: Bench, evaluator: Evaluator, signals: Signals, folder: Path, *, title: str, plans: int
) -> Iterator[MeasureOne]:
    """Inside the block, `reward(keep_counts)` measures a plan, or says what was measured before.

    Args:
        bench: the model.
        evaluator: what measures a plan.
        signals: whose groups and scores plans are about.
        folder: folder of the plans that were measured; an interrupted measurement goes on.
        title: name of the work beside the progress bar.
        plans: number of plans that will be asked for.

    Raises:
        CheckpointError: the folder has rewards of another evaluator or of other scores.
    """
    identity = {"evaluator": evaluator.digest, "ranking": signals.ranking}
    with contextlib.ExitStack() as block:
        block.enter_context(RunFolder(folder, identity))
        known = dict(read_rewards(folder))
        update = block.enter_context(progress_bar(True, title, plans, len(known)))
        measure: MeasureOne | None = None

        def reward(keeps: KeepCounts) -> Reward:
            nonlocal measure
            if keeps in known:
                return known[keeps]
            if measure is None:  # the model is prepared for plans that are new alone
                cost = cost_of(signals.groups, "parameters")
                measure = block.enter_context(plan_rewards(bench.quick, evaluator, signals, cost))
            known[keeps] = measure(keeps)
            rows = [[list(keeps), own.as_dict()] for keeps, own in known.items()]
            write_atomic(folder / NAME, json.dumps(rows))
            update(len(known), "")
            return known[keeps]

        yield reward


def read_rewards(folder: Path) -> list[tuple[KeepCounts, Reward]]:
    """Every plan that was measured there with its reward, in the order of their measurement."""
    file = folder / NAME
    rows = json.loads(file.read_text()) if file.exists() else []
    return [(tuple(keeps), Reward(**reward)) for keeps, reward in rows]
