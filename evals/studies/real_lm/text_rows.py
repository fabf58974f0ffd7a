"""Rows of a text as training data."""

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from hipp_ext.calibration import Batch


class TextRows:
    """A `DataSource` of rows of equal length; every epoch has a new order.

    Args:
        rows: the rows; every token but the first is a label.
        batch_size: rows per process and step.
        seed: random seed of the order.
    """

    def __init__(self, rows: Int[Tensor, "rows tokens"], *, batch_size: int, seed: int):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed

    def batches(self, rank: int, workers: int, start: int) -> Iterator[list[Batch]]:
        """See `DataSource`; every process takes other rows."""
        taken, step = workers * self.batch_size, start
        while True:
            epoch, place = divmod(step, len(self.rows) // taken)
            generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
            order = torch.randperm(len(self.rows), generator=generator)
            first = place * taken + rank * self.batch_size
            yield [labelled(self.rows[order[first : first + self.batch_size]])]
            step += 1


def labelled(ids: Int[Tensor, "rows tokens"]) -> Batch:
    """A batch of rows whose tokens are their labels."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
