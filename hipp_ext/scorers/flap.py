"""FLAP: a unit whose output hardly varies can be replaced by its mean."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hipp_ext.calibration import Batch
from hipp_ext.groups import Group
from hipp_ext.scorers.base import (
    Groups,
    InputMoments,
    Scorer,
    Scores,
    consumer_weight,
    input_moments,
    per_unit,
)


@dataclass(frozen=True, kw_only=True)
class FLAP(Scorer):
    """Variance of the consumer's input times its column's squared norm (WIFV). Higher = keep.

    A unit's score is the mean over its columns.

    Source: FLAP (arXiv 2312.11983), section 3.2, weighted input feature variance.
    Differs from the paper: this is only the score. The adaptive structure is an allocator here,
    `hipp_ext.allocators.FLAPAdaptive`; the bias compensation is left out.
    """

    def score(self, model: nn.Module, groups: Groups, batches: Sequence[Batch]) -> Scores:
        moments = input_moments(model, groups, batches)
        return {g.name: per_unit(fluctuation(model, g, moments[g.name]), g).mean(1) for g in groups}


@torch.no_grad()
def fluctuation(model: nn.Module, group: Group, moments: InputMoments) -> Tensor:
    """(width * columns,) weighted variance of every input column of the consumer, float64."""
    return moments.variance * consumer_weight(model, group).float().square().sum(0).cpu().double()
