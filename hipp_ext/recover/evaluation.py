"""What is measured of a model while it is trained: the objective on held-out rows, and more."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hipp_ext.errors import HippError
from hipp_ext.modes import evaluating
from hipp_ext.recover.counts import WHOLE, Counts, summed
from hipp_ext.recover.processes import Pass, Processes, WeightedLoss
from hipp_ext.recover.teachers import unwrapped

Measure = Callable[[nn.Module], Mapping[str, float]]


def evaluate(
    loss: WeightedLoss, data: Any, group: Processes, measure: Measure | None
) -> dict[str, float]:
    """What is measured of the model as it is, the same on every process.

    Args:
        loss: the objective of the model.
        data: source whose `held_out(rank, workers)` gives the held-out rows, if it has any.
        group: the processes, which share the rows.
        measure: function of the model, which the first process calls.

    Returns:
        Every loss of the objective on the held-out rows, mean over its positions [nats], by name;
        and what `measure` returns.
    """
    found = _losses(loss, data, group) if len(getattr(data, "held", ())) else {}
    if measure is not None:
        own: dict[str, float] = {}
        if group.rank == 0:
            with evaluating(loss), group.accelerator.autocast():
                own = {name: float(value) for name, value in measure(unwrapped(loss.model)).items()}
        found |= group.gathered(own)[0]
    return found


def _losses(loss: WeightedLoss, data: Any, group: Processes) -> dict[str, float]:
    # The processes take part in every pass of a sharded model: each evaluates all rows.
    rank, workers = (0, 1) if group.sharded else (group.rank, group.workers)
    sums: dict[str, float] = {}
    counts: list[Counts] = []
    with torch.no_grad(), evaluating(loss):
        for batch in data.held_out(rank, workers):
            counts.append(loss.objective.counts(batch))
            for name, value in loss(Pass(batches=[batch], weights=[WHOLE]))[0].items():
                sums[name] = sums.get(name, 0.0) + float(value) * counts[-1].of(name)
    group.after_passes(loss)
    # A process without rows knows no names.
    names = sorted({name for own in group.gathered(list(sums)) for name in own})
    *totals, learnt, answered = group.total([*(sums.get(n, 0.0) for n in names), *summed(counts)])
    if not learnt:
        raise HippError("None of the held-out rows can be used: hold out more of them.")
    every = Counts(learnt, answered)
    means = {name: value / every.of(name) for name, value in zip(names, totals, strict=True)}
    return means | {"loss": loss.objective.total(means)}
