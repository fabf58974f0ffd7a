"""FLAP: a unit whose output hardly varies can be replaced by its mean."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hipp_ext.calibration import Batch
from hipp_ext.groups import Group
from hipp_ext.scorers.base import InputMoments, Scorer, consumer_weight, input_moments, per_unit


class FLAP(Scorer):
    """Variance of the consumer's input times the squared norm of its column (WIFV), averaged over a unit. Higher = keep.

    Source: FLAP (arXiv 2312.11983), section 3.2, weighted input feature variance.
    Differs from the paper: only the score. Its adaptive structure is an allocation (standardise, rank all groups
    together) and its bias compensation a repair step; both are kept apart from scoring here.
    """

    def _score(
        self, model: nn.Module, groups: Sequence[Group], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        moments = input_moments(model, groups, batches)
        return {g.name: per_unit(fluctuation(model, g, moments[g.name]), g).mean(1) for g in groups}


@torch.no_grad()
def fluctuation(model: nn.Module, group: Group, moments: InputMoments) -> Tensor:
    """(width * columns,) weighted variance of every input column of the consumer, float64."""
    return moments.variance * consumer_weight(model, group).float().square().sum(0).cpu().double()
