"""Taylor: how much the loss would change, to first order, if a unit were removed."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from hipp_ext.calibration import Batch
from hipp_ext.scorers.base import Groups, Scorer, Scores, forward, require_labels
from hipp_ext.scorers.gates import gated_group, unit_taylor

GRADIENT_PASSES = 3.0  # forward passes that one with gradients costs


@dataclass(frozen=True, kw_only=True)
class Taylor(Scorer):
    """Root mean square over batches of the loss's derivative with respect to a gate on the unit.

    Higher = keep. The calibration needs `labels`; smaller batches give a finer average.

    Source: Molchanov et al. (arXiv 1906.10771), eq. 8, gates placed after the layer.
    Differs from the paper: squares are averaged over batches instead of single examples.
    """

    def passes(self, groups: Groups) -> float:
        return GRADIENT_PASSES

    def score(self, model: nn.Module, groups: Groups, batches: Sequence[Batch]) -> Scores:
        require_labels(batches, "Taylor needs a loss")
        scores = unit_taylor(model, [gated_group(g) for g in groups], mean_loss, batches)
        return {g.name: s for g, s in zip(groups, scores, strict=True)}


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of `batch`'s labels."""
    return forward(model, batch, labels=True).loss.float()
