"""Taylor: how much the loss would change, to first order, if a unit were removed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hipp_ext.calibration import Batch
from hipp_ext.groups import Group
from hipp_ext.scorers.base import Scorer, consumer_weight, forward, per_unit, require_labels


@dataclass(frozen=True, kw_only=True)
class Taylor(Scorer):
    """Root mean square over batches of the loss's derivative by a unit's gate. Higher = keep.

    The gate multiplies the unit's output. Its derivative equals the sum of W * dL/dW over the
    unit's columns of the consumer's weight W, so only those gradients are kept. The calibration
    needs `labels`; small batches give a finer average.

    Source: Molchanov et al. (arXiv 1906.10771), eq. 8, gates placed after the layer.
    Differs from the paper: squares are averaged over batches instead of single examples.
    """

    def score(
        self, model: nn.Module, groups: Sequence[Group], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        require_labels(batches, "Taylor needs a loss")
        weights = [consumer_weight(model, g) for g in groups]
        squares = [torch.zeros(g.width, dtype=torch.float64) for g in groups]
        flags = [(p, p.requires_grad) for p in model.parameters()]
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            for weight in weights:
                weight.requires_grad_(True)
            for batch in batches:
                with torch.enable_grad():
                    gradients = torch.autograd.grad(
                        forward(model, batch, labels=True).loss, weights, materialize_grads=True
                    )
                for g, weight, gradient, square in zip(
                    groups, weights, gradients, squares, strict=True
                ):
                    gate = (weight.detach().float() * gradient.float()).sum(0).double().cpu()
                    square += per_unit(gate, g).sum(1).square()
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        return {g.name: (s / len(batches)).sqrt() for g, s in zip(groups, squares, strict=True)}
