"""Loss sensitivity per group: worst-case weight perturbation, first-order bound, unit removal.

A group is what is pruned together: a group of a language tower, or convolutions whose channels are
coupled. `MRS` (scorers/mrs.py) uses these functions with the loss on adversarial inputs; on clean
inputs they give the plain sensitivities to compare with.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.errors import CalibrationError
from hipp_ext.modes import training_only
from hipp_ext.scorers.gates import GatedGroup, Loss, gated
from hipp_ext.units import unit_order

REMOVAL_FLOOR = 0.01  # least rise of the loss [nats]; below it noise decides


def worst_case(
    model: nn.Module,
    groups: Sequence[GatedGroup],
    loss: Loss,
    batches: Sequence[Any],
    *,
    rho: float = 0.1,
    steps: int = 10,
    stochastic: bool = False,
) -> list[float]:
    """Per group, the rise of the loss when its weights move by at most `rho` of their norm.

    Gradient ascent, normalised per tensor, in steps of 2 rho ||W|| / `steps`, projected on the ball
    of every tensor; the largest rise counts. It is divided by the number of tensors, because
    several that climb together climb further.

    Args:
        model: its weights are moved, and restored afterwards.
        groups: their producers' weights move, one group at a time.
        loss: (model, batch) -> mean loss.
        batches: whatever `loss` takes.
        rho: radius of the ball, as a fraction of a tensor's norm.
        steps: number of gradient steps.
        stochastic: every step uses one batch, in turn, and the rise is that after the last step, on
            every other batch.

    Cost: about `steps` forward and backward passes over `batches` per group; stochastic, with as
    many batches as steps, one such pass and half a forward pass.

    Source: module robust criticality, Zhu et al. (arXiv 2308.02533), eq. 2 and algorithm 1.
    Differs from the paper: normalised gradients instead of SGD with a learning rate of 1, the
    maximum over steps, division by the number of tensors.
    """
    judged = batches[::2] if stochastic else batches
    start, rises = _mean_loss(model, loss, judged), []
    for group in groups:
        tensors = [model.get_parameter(name) for name in group.weights]
        original = [p.detach().clone() for p in tensors]
        # float32, so that small steps add up in half precision too.
        moved = [torch.zeros_like(p, dtype=torch.float32) for p in tensors]
        radii = [rho * float(p.detach().float().norm()) for p in tensors]
        best = 0.0
        try:
            with training_only(model, tensors):
                for step in range(steps):
                    here = [batches[step % len(batches)]] if stochastic else batches
                    value, gradients = _loss_and_gradients(model, loss, here, tensors)
                    if not stochastic:
                        best = max(value - start, best)  # in this order NaN stays NaN
                    for p, old, delta, gradient, radius in zip(
                        tensors, original, moved, gradients, radii, strict=True
                    ):
                        delta += 2 * radius / steps * gradient / gradient.norm().clamp_min(1e-30)
                        delta *= min(1.0, radius / max(float(delta.norm()), 1e-30))
                        p.data.copy_(old.float() + delta)
                best = max(_mean_loss(model, loss, judged) - start, best)
        finally:
            for p, old in zip(tensors, original, strict=True):
                p.data.copy_(old)
        rises.append(best / len(tensors))
    return rises


def first_order(
    model: nn.Module,
    groups: Sequence[GatedGroup],
    loss: Loss,
    batches: Sequence[Any],
    *,
    rho: float = 0.1,
) -> list[float]:
    """Per group, `worst_case` to first order: rho times the mean of ||W|| ||dL/dW||.

    Cost: one forward and backward pass over `batches` for all groups together.
    """
    names = list(dict.fromkeys(name for group in groups for name in group.weights))
    tensors = [model.get_parameter(name) for name in names]
    with training_only(model, tensors):
        _, gradients = _loss_and_gradients(model, loss, batches, tensors)
    norms = {
        n: float(p.detach().float().norm() * g.norm())
        for n, p, g in zip(names, tensors, gradients, strict=True)
    }
    return [rho * sum(norms[n] for n in group.weights) / len(group.weights) for group in groups]


def removal(
    model: nn.Module,
    groups: Sequence[GatedGroup],
    loss: Loss,
    batches: Sequence[Any],
    ranking: Sequence[Tensor],
    *,
    ratio: float = 0.5,
) -> list[float]:
    """Per group, the rise of the loss when its lowest-ranked units are removed.

    It is at least REMOVAL_FLOOR; the other groups stay whole. Cost: one forward pass over
    `batches` per group.

    Args:
        model: left as it was.
        groups: those to measure.
        loss: (model, batch) -> mean loss.
        batches: whatever `loss` takes.
        ranking: per group one score per unit, higher = keep.
        ratio: fraction of the units to remove; at least one goes, and at least one stays.
    """
    start, rises = _mean_loss(model, loss, batches), []
    for group, scores in zip(groups, ranking, strict=True):
        with gated(model, [group], [removal_mask(scores, ratio, group.sections)]):
            rises.append(max(_mean_loss(model, loss, batches) - start, REMOVAL_FLOOR))
    return rises


def removal_mask(
    scores: Float[Tensor, " width"], ratio: float, sections: int = 1
) -> Float[Tensor, " width"]:
    """1 for the units that stay when the lowest `ratio` of every section go, else 0."""
    width = len(scores) // sections
    keep = width if width == 1 else min(width - 1, max(1, round(width * (1 - ratio))))
    mask = torch.zeros(len(scores))
    mask[unit_order(scores, sections)[: keep * sections]] = 1
    return mask


def _loss_and_gradients(
    model: nn.Module, loss: Loss, batches: Sequence[Any], tensors: Sequence[Tensor]
) -> tuple[float, list[Tensor]]:
    """Means over batches of the loss and of its gradients (float32); `.grad` stays as it is."""
    value, total = 0.0, [torch.zeros_like(t, dtype=torch.float32) for t in tensors]
    for batch in batches:
        with torch.enable_grad():
            here = loss(model, batch)
            gradients = torch.autograd.grad(here, tensors, materialize_grads=True)
        value += float(here.detach()) / len(batches)
        for t, gradient in zip(total, gradients, strict=True):
            t += gradient.float() / len(batches)
    return value, total


@torch.no_grad()
def _mean_loss(model: nn.Module, loss: Loss, batches: Sequence[Any]) -> float:
    if not len(batches):
        raise CalibrationError("A sensitivity needs at least one batch.")
    return sum(float(loss(model, batch)) for batch in batches) / len(batches)
