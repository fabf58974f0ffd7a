"""The passes of a step: which batches go through the model together, and how their losses count."""

from collections.abc import Sequence

from hipp_ext.calibration import Batch
from hipp_ext.recover.counts import Counts, summed
from hipp_ext.recover.objectives import Objective
from hipp_ext.recover.processes import Pass, Processes


def make_passes(
    items: Sequence[Sequence[Batch]], group: Processes, objective: Objective, token_mean: bool
) -> list[Pass]:
    """The passes of a step of this process.

    Args:
        items: what the data source gave for the step, `accumulation` lists of batches.
        group: the processes, whose mean is the loss.
        objective: says what the losses of a batch are means over.
        token_mean: every loss is the mean over its positions in all batches and processes, and each
            batch is a pass. Otherwise the losses of a list are summed in one pass, and the lists
            averaged.
    """
    if not token_mean:
        equal = Counts(1 / len(items), 1 / len(items))
        return [Pass(batches=own, weights=[equal] * len(own)) for own in items]
    batches = [batch for own in items for batch in own]
    counts = [objective.counts(batch) for batch in batches]
    # The processes are averaged: what each of them gives counts once in so many.
    mean = [number / group.workers for number in group.total(summed(counts))]
    passes = [
        Pass(batches=[batch], weights=[own.shares(mean)])
        for batch, own in zip(batches, counts, strict=True)
    ]
    if group.sharded:  # every process takes part in every pass
        most = max(group.gathered(len(passes)))
        passes += [Pass(batches=[batches[-1]], weights=[Counts(0, 0)])] * (most - len(passes))
    return passes
