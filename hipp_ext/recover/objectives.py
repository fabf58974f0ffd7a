"""What a pruned model minimises: a loss, and over how many positions it is a mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from hipp_ext.calibration import Batch
from hipp_ext.recover.counts import WHOLE, Counts, counted_labels


@runtime_checkable
class Objective(Protocol):
    """A loss of a model on a batch.

    Attributes:
        identity: what must be equal for a run to go on, as JSON values.
    """

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def prepare(self, model: nn.Module, batch: Batch) -> None:
        """Check and measure what is needed of the model once, before its weights change.

        A run that goes on from a checkpoint calls it on the model as it was first given, so that it
        measures the same.
        """
        ...

    def counts(self, batch: Batch) -> Counts:
        """The positions of the batch that its losses are means over."""
        ...

    def losses(self, model: nn.Module, batch: Batch, weights: Counts = WHOLE) -> dict[str, Tensor]:
        """Scalars by name [nats per token, mean over the counted positions].

        "loss" is minimised, and its parts are multiplied by the weights of their positions: what a
        batch counts among others. All others are for the report, detached, and without weights.
        """
        ...

    def total(self, losses: Mapping[str, float]) -> float:
        """The "loss" that belongs to the other losses, which may be means over several batches."""
        ...


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """The model's own loss on the labels of the data."""

    @property
    def identity(self) -> dict[str, Any]:
        """See `Objective`."""
        return {"name": type(self).__name__}

    def prepare(self, model: nn.Module, batch: Batch) -> None:
        """Nothing is measured."""

    def counts(self, batch: Batch) -> Counts:
        """See `Objective.counts`: the labels."""
        return Counts(*[counted_labels(batch)] * 2)

    def losses(self, model: nn.Module, batch: Batch, weights: Counts = WHOLE) -> dict[str, Tensor]:
        """See `Objective.losses`: "loss"."""
        return {"loss": weights.learnt * model(**batch).loss}

    def total(self, losses: Mapping[str, float]) -> float:
        """See `Objective.total`."""
        return losses["loss"]
