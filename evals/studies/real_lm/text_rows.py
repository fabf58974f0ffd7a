"""Rows of a text as training data."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hipp_ext.calibration import Batch


class TextRows:
    """A `DataSource` of rows of equal length; every epoch has a new order, every process other rows.

    Args:
        rows: the rows; every token but the first is a label.
        batch_size: rows per process and step.
        seed: random seed of the order.
        held: rows that are evaluated at intervals and not trained on; None: there are none.
    """

    def __init__(
        self,
        rows: Int[Tensor, "rows tokens"],
        *,
        batch_size: int,
        seed: int,
        held: Int[Tensor, "held tokens"] | None = None,
    ):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.held: Sequence[Any] | Tensor = () if held is None else held

    def batches(self, rank: int, workers: int, start: int) -> Iterator[list[Batch]]:
        """See `DataSource`."""
        taken, step = workers * self.batch_size, start
        while True:
            epoch, place = divmod(step, len(self.rows) // taken)
            generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
            order = torch.randperm(len(self.rows), generator=generator)
            first = place * taken + rank * self.batch_size
            yield [labelled(self.rows[order[first : first + self.batch_size]])]
            step += 1

    def held_out(self, rank: int, workers: int) -> Iterator[Batch]:
        """Batches of the held-out rows that this process evaluates."""
        assert isinstance(self.held, Tensor)
        return map(labelled, self.held[rank::workers].split(self.batch_size))


def labelled(ids: Int[Tensor, "rows tokens"]) -> Batch:
    """A batch of rows whose tokens are their labels."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
