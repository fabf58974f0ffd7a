"""Rewards of plans that are measured once: what was measured is kept in a file."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from hipp_ext.evals.studies.smolworld.table.bench import Bench
from hipp_ext.files import write_atomic
from hipp_ext.planner import Signals
from hipp_ext.planner.cost import cost_of
from hipp_ext.planner.evaluation import KeepCounts, plan_rewards
from hipp_ext.planner.reward import Evaluator, Reward
from hipp_ext.progress import progress_bar


@contextlib.contextmanager
def kept_rewards(
    bench: Bench, evaluator: Evaluator, signals: Signals, file: Path, *, title: str, plans: int
) -> Iterator[Callable[[KeepCounts], Reward]]:
    """Inside the block, `reward(keep_counts)` measures a plan, or reads it from `file`.

    Args:
        bench: the model.
        evaluator: what measures a plan.
        signals: whose groups and scores plans are about.
        file: JSON of the plans that were measured; an interrupted measurement goes on.
        title: name of the work beside the progress bar.
        plans: number of plans that will be asked for.
    """
    known = dict(read_rewards(file))
    with (
        plan_rewards(
            bench.quick, evaluator, signals, cost_of(signals.groups, "parameters")
        ) as measure,
        progress_bar(True, title, plans, len(known)) as update,
    ):

        def reward(keeps: KeepCounts) -> Reward:
            if keeps not in known:
                known[keeps] = measure(keeps)
                _write(file, known)
                update(len(known), "")
            return known[keeps]

        yield reward


def read_rewards(file: Path) -> list[tuple[KeepCounts, Reward]]:
    """Every plan of `file` with its reward, in the order of their measurement."""
    rows = json.loads(file.read_text()) if file.exists() else []
    return [(tuple(keeps), Reward(**reward)) for keeps, reward in rows]


def _write(file: Path, known: dict[KeepCounts, Reward]) -> None:
    rows = [[list(keeps), reward.as_dict()] for keeps, reward in known.items()]
    write_atomic(file, json.dumps(rows))
