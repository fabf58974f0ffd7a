"""The passes of a step: which batches go through the model together, and how their losses count."""

from collections.abc import Sequence

from hipp_ext.calibration import Batch
from hipp_ext.recover.processes import Pass, Processes


def make_passes(items: Sequence[Sequence[Batch]], group: Processes, token_mean: bool) -> list[Pass]:
    """The passes of a step of this process.

    Args:
        items: what the data source gave for the step, `accumulation` lists of batches.
        group: the processes, whose mean is the loss.
        token_mean: the loss is the mean over the counted tokens of all batches and processes, and
            each batch is a pass. Otherwise the losses of a list are summed in one pass, and the
            lists averaged.
    """
    if not token_mean:
        return [Pass(batches=own, weights=[1 / len(items)] * len(own)) for own in items]
    batches = [batch for own in items for batch in own]
    counts = [counted_tokens(batch) for batch in batches]
    total = group.total([sum(counts)])[0] or 1
    passes = [
        Pass(batches=[batch], weights=[count * group.workers / total])
        for batch, count in zip(batches, counts, strict=True)
    ]
    if group.sharded:  # every process takes part in every pass
        most = max(group.gathered(len(passes)))
        passes += [Pass(batches=[batches[-1]], weights=[0.0])] * (most - len(passes))
    return passes


def counted_tokens(batch: Batch) -> int:
    """Tokens that a batch asks for: labels that a token before them predicts."""
    return int((batch["labels"][:, 1:] != -100).sum()) if "labels" in batch else 0
