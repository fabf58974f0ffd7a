"""Keep counts -> reward: the evaluator runs on slices of one model, in one process or several."""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from hipp_ext.budget import Cost
from hipp_ext.planner.cost import compression
from hipp_ext.planner.reward import Evaluator, Reward, read_reward
from hipp_ext.planner.state import Signals
from hipp_ext.surgery.slices import sliced

TIMEOUT = datetime.timedelta(days=1)  # an evaluation may be slow; torchrun ends all if one dies
KeepCounts = tuple[int, ...]
MeasureOne = Callable[[KeepCounts], Reward]
MeasureMany = Callable[[Sequence[KeepCounts]], list[Reward]]


@contextlib.contextmanager
def plan_rewards(
    model: nn.Module, evaluator: Evaluator, signals: Signals, cost: Cost
) -> Iterator[MeasureOne]:
    """Inside the block, `measure(keep_counts)` evaluates a slice of the model, see `sliced`."""
    with sliced(model, signals.groups, signals.scores) as shrink:

        def measure(keep_counts: KeepCounts) -> Reward:
            shrink(keep_counts)
            saved = float(compression(cost, signals.groups, [keep_counts])[0])
            return read_reward(evaluator(model), saved)

        yield measure


class Workers:
    """The processes of `torchrun`: the first one leads, and all of them evaluate plans.

    With one process, or without torch.distributed, everything happens in the leader.
    """

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

    @classmethod
    def join(cls) -> "Workers":
        """The processes of `torchrun`, connected by gloo; without torchrun, this process alone."""
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist.is_available()
        if several and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=TIMEOUT)
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
        """For the leader: inside the block, all processes measure plans, each one at a time."""

        def measure_many(plans: Sequence[KeepCounts]) -> list[Reward]:
            assert len(plans) <= self.count
            self.share(list(plans))
            return self._gather(_attempt(measure, plans[0]))[: len(plans)]

        try:
            yield measure_many
        finally:
            self.share(None)

    def serve(self, measure: MeasureOne) -> None:
        """For the others: measure the leader's plans until it is done."""
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


def _attempt(measure: MeasureOne, keep_counts: KeepCounts) -> Reward | BaseException:
    """The reward, or the exception, so that the leader can raise it again."""
    try:
        return measure(keep_counts)
    except BaseException as error:
        return error
