"""WandaSP: weight times activation norm, summed over a unit."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hipp_ext.calibration import Batch
from hipp_ext.groups import Group
from hipp_ext.scorers.base import Groups, Scorer, Scores, consumer_weight, input_moments, per_unit


@dataclass(frozen=True, kw_only=True)
class WandaSP(Scorer):
    """Mean over rows of |W| * ||x||_2, summed over a unit's columns. Higher = keep.

    W is the consumer's weight (o_proj, down_proj), x its inputs over all calibration tokens that
    are not padding.

    Source: Wanda (arXiv 2306.11695), eq. 1; its structured form is FLAP's baseline (arXiv
    2312.11983, section 4.1).
    """

    def score(self, model: nn.Module, groups: Groups, batches: Sequence[Batch]) -> Scores:
        moments = input_moments(model, groups, batches)
        return {g.name: wanda_score(model, g, moments[g.name].norm) for g in groups}


@torch.no_grad()
def wanda_score(model: nn.Module, group: Group, input_norm: Tensor) -> Tensor:
    """(width,) scores from the L2 norm of each consumer input column."""
    magnitude = consumer_weight(model, group).abs().mean(0, dtype=torch.float32).cpu().double()
    return per_unit(magnitude * input_norm, group).sum(1)
