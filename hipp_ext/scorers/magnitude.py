"""Magnitude: how large the weights of a unit are. Needs no data."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hipp_ext.calibration import Batch
from hipp_ext.groups import linear
from hipp_ext.scorers.base import Groups, Scorer, Scores, consumer_weight, per_unit, sum_of_squares


@dataclass(frozen=True, kw_only=True)
class Magnitude(Scorer):
    """L2 norm of a unit's rows in the producers and columns in the consumer. Higher = keep.

    Source: Li et al., Pruning Filters for Efficient ConvNets (arXiv 1608.08710), for coupled layers
    as in DepGraph (arXiv 2301.12900).
    Differs from the paper: L2 instead of L1, and the norm of the whole coupled unit instead of one
    layer's filter.
    """

    needs_calibration = False

    @torch.no_grad()
    def score(self, model: nn.Module, groups: Groups, batches: Sequence[Batch]) -> Scores:
        scores = {}
        for g in groups:
            squares = per_unit(sum_of_squares(consumer_weight(model, g), 0), g).sum(1)
            for part in g.produced:
                weight = linear(model, part.layer).weight
                rows = weight.narrow(part.dim, part.start, g.width * part.size)
                squares = squares + sum_of_squares(rows, 1).view(g.width, -1).sum(1)
            scores[g.name] = squares.sqrt()
        return scores
