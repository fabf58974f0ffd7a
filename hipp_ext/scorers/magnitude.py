"""Magnitude: how large the weights of a unit are. Needs no data."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.calibration import Batch
from hipp_ext.groups import Group
from hipp_ext.kinds.slices import Slice, tensor_in
from hipp_ext.scorers.base import Groups, Scorer, Scores

TILE = 64  # units


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
            weights = (*g.produced, g.owns[-1]) if g.is_linear else g.owns
            squares = [_squares(model, g, part) for part in weights if "bias" not in part.parameter]
            scores[g.name] = torch.stack(squares).sum(0).sqrt()
        return scores


def _squares(model: nn.Module, group: Group, part: Slice) -> Float[Tensor, " width"]:
    """Sum of the squares of what each unit owns there; tile by tile, without a copy of it all."""
    owned = tensor_in(model, part.parameter).narrow(part.dim, part.start, group.width * part.size)
    units = owned.unflatten(part.dim, (group.width, part.size)).movedim(part.dim, 0)
    return torch.cat([tile.float().square().flatten(1).sum(1) for tile in units.split(TILE)])
