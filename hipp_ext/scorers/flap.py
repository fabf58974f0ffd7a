"""FLAP: a unit whose output hardly varies can be replaced by its mean."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hipp_ext.calibration import Batch
from hipp_ext.groups import Group
from hipp_ext.scorers.base import Scorer, consumer_weight, input_moments, per_unit


class FLAP(Scorer):
    """Variance of the consumer's input times the squared norm of its column (WIFV), averaged over a unit. Higher = keep.

    Source: FLAP (arXiv 2312.11983), section 3.2, weighted input feature variance.
    Differs from the paper: only the score. Its adaptive structure is an allocation (standardise, rank all groups
    together) and its bias compensation a repair step; both are kept apart from scoring here.
    """

    @torch.no_grad()
    def _score(self, model: nn.Module, groups: Sequence[Group], batches: Sequence[Batch]) -> dict[str, Tensor]:
        moments = input_moments(model, groups, batches)
        scores = {}
        for g in groups:
            column_norm = consumer_weight(model, g).float().square().sum(0).cpu().double()
            scores[g.name] = per_unit(moments[g.name].variance * column_norm, g).mean(1)
        return scores
