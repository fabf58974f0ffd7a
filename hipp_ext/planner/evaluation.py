"""Keep counts -> reward: the evaluator run on slices of one model, by one process or by several."""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from hipp_ext.planner.cost import Cost
from hipp_ext.planner.reward import Evaluator, Reward, read_reward
from hipp_ext.planner.state import Signals, keep_shares
from hipp_ext.scorers.synflow import stability
from hipp_ext.surgery.slices import sliced
from hipp_ext.units import plan_from_counts

PATIENCE = datetime.timedelta(
    days=1
)  # processes wait for the slowest evaluation; torchrun ends them all if one dies
Keeps = tuple[int, ...]
MeasureOne = Callable[[Keeps], Reward]
MeasureMany = Callable[[Sequence[Keeps]], list[Reward]]


@contextlib.contextmanager
def plan_rewards(
    model: nn.Module, evaluator: Evaluator, signals: Signals, cost: Cost
) -> Iterator[MeasureOne]:
    """Inside the block, `measure(keeps)` evaluates `model` shrunk to those keep counts; see `sliced`."""
    with sliced(model, signals.groups, signals.scores) as shrink:

        def measure(keeps: Keeps) -> Reward:
            shrink(keeps)
            return read_reward(
                evaluator(model),
                plan_compression(signals, cost, keeps),
                plan_stability(signals, keeps),
            )

        yield measure


def plan_compression(signals: Signals, cost: Cost, keeps: Keeps) -> float:
    """Share of the cost that a plan saves; the objective "compression"."""
    return float(cost.removed(keep_shares(signals.groups, [keeps]))[0])


def plan_stability(signals: Signals, keeps: Keeps) -> float:
    """Log of the synaptic flow that a plan retains; 0 for the dense model."""
    return stability(plan_from_counts(signals.groups, keeps, signals.scores), signals.flow_shares)


class Workers:
    """The processes that `torchrun` started: the first one leads and decides, the others evaluate what it hands out.

    With one process, or without torch.distributed, everything happens in the leader.
    """

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

    @classmethod
    def join(cls) -> "Workers":
        """The processes of `torchrun`, brought together over gloo; without it, this process alone."""
        if (
            int(os.environ.get("WORLD_SIZE", "1")) > 1
            and dist.is_available()
            and not dist.is_initialized()
        ):
            dist.init_process_group("gloo", timeout=PATIENCE)
        return cls()

    @property
    def leads(self) -> bool:
        """Whether this process is the first one."""
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """The leader's `value`, in every process."""
        if self.count == 1:
            return value
        box = [value if self.leads else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextlib.contextmanager
    def leading(self, measure: MeasureOne) -> Iterator[MeasureMany]:
        """For the leader: inside the block, plans are measured by all processes, at most `count` of them at a time."""

        def measure_many(plans: Sequence[Keeps]) -> list[Reward]:
            assert len(plans) <= self.count
            self.share(list(plans))
            return self._gather(_attempt(measure, plans[0]))[: len(plans)]

        try:
            yield measure_many
        finally:
            self.share(None)

    def serve(self, measure: MeasureOne) -> None:
        """For the others: measure what the leader hands out until it is done."""
        while (plans := self.share(None)) is not None:
            self._gather(_attempt(measure, plans[self.rank]) if self.rank < len(plans) else None)

    def _gather(self, mine: Any) -> list[Any]:
        if self.count == 1:
            everything = [mine]
        else:
            everything = [None] * self.count if self.leads else None
            dist.gather_object(mine, everything, dst=0)
        for result in everything or ():
            if isinstance(result, BaseException):
                raise result
        return everything or []


def _attempt(measure: MeasureOne, keeps: Keeps) -> Reward | BaseException:
    """The reward, or the error in its place: the leader must hear of it, whoever it befell."""
    try:
        return measure(keeps)
    except BaseException as error:
        return error
