"""FLAP's compensation: the mean output of what is removed becomes a bias."""

import torch
from torch import nn

from hipp_ext.calibration import Calibration
from hipp_ext.plan import PruningPlan
from hipp_ext.projections import matrix_of, projection
from hipp_ext.scorers.base import input_moments
from hipp_ext.surgery.masks import match
from hipp_ext.surgery.prune import prune
from hipp_ext.units import unit_entries


@torch.no_grad()
def prune_with_bias(model: nn.Module, plan: PruningPlan, calibration: Calibration) -> nn.Module:
    """What `prune` returns, with a bias in every consumer (o_proj, down_proj) that lost columns.

    The bias is what the lost columns add to the output on the mean of their dense inputs.

    Args:
        model: a language model; it is left as it was.
        plan: a plan that keeps something of every group.
        calibration: batches that the means are of; costs one forward pass.

    Source: FLAP (arXiv 2312.11983), section 3, baseline bias compensation.
    """
    groups = match(model, plan)
    moments = input_moments(model, groups, calibration.batches)
    small = prune(model, plan)
    for group, entry in zip(groups, plan.groups, strict=True):
        assert entry.keep, f"{group.name} is dropped"
        gone = torch.tensor(sorted(set(range(entry.width)) - set(entry.kept)), dtype=torch.long)
        columns, found = unit_entries(gone, group.columns), moments[group.name]
        weight = matrix_of(projection(model, group.consumer))
        consumer = projection(small, group.consumer)
        bias = weight[:, columns].double() @ (found.sum[columns] / found.tokens)
        if consumer.bias is not None:
            bias += consumer.bias
        consumer.bias = nn.Parameter(bias.to(weight.dtype))
    return small
