"""Sensitivity by removed units, and the levels at which it is kept."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

# Removed fractions of a group's units; at 1 the block is dropped.
LEVELS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
FLOOR = 1e-9  # nats; a quadratic estimate below it is noise, and is not divided by


def at_levels(curve: Float[Tensor, "*batch removals"]) -> Float[Tensor, "*batch levels"]:
    """The values of a curve at LEVELS, float32.

    Between two counts of units the value is their linear interpolation: a fraction that a group
    cannot lose exactly is lost on average.

    Args:
        curve: value for every number of removed units, from 0 to all.
    """
    width = curve.shape[-1] - 1
    place = torch.tensor(LEVELS, dtype=torch.float64) * width
    low = place.floor().long().clamp_max(width - 1)
    way = (place - low).to(curve)
    return torch.lerp(curve[..., low], curve[..., low + 1], way).float()


def anchored_curve(
    estimate: Float[Tensor, " removals"], measured: Mapping[int, float]
) -> Float[Tensor, " removals"]:
    """The estimate, scaled to go through the measured points.

    The factor is interpolated over the removed units on a logarithmic scale, and constant beyond
    the outermost points.

    Args:
        estimate: [nats] for every number of removed units, from 0 to all.
        measured: number of removed units -> measured value [nats].
    """
    points = sorted((k, value) for k, value in measured.items() if k > 0)
    if not points:
        return estimate
    safe = estimate.double().clamp_min(FLOOR)
    at = torch.tensor([k for k, _ in points])
    values = torch.tensor([value for _, value in points], dtype=torch.float64).clamp_min(FLOOR)
    factors = (values / safe[at]).log()
    place = torch.arange(len(estimate), dtype=torch.float64)
    after = torch.searchsorted(at.double(), place).clamp(1, max(1, len(at) - 1))
    if len(at) == 1:
        scaled = safe * factors.exp()
    else:
        low, high = at[after - 1].double(), at[after].double()
        way = ((place - low) / (high - low)).clamp(0, 1)
        scaled = safe * torch.lerp(factors[after - 1], factors[after], way).exp()
    scaled[0] = 0
    return scaled
