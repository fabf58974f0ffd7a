"""Sensitivity by removed units, and the levels at which it is kept."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

# Removed fractions of a group's units; at 1 the block is dropped.
LEVELS = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
QUARTER = 0.25  # removed fraction at which the size of a curve is taken
NARROW = 8  # units: groups of at most so many have a curve of their own shape
FLOOR = 1e-12  # nats; smaller values are rounding, and are not divided by


def units_at(level: float, width: int) -> int:
    """Number of removed units nearest to a level, at least 1."""
    return max(1, round(level * width))


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


def loss_curve(
    estimate: Float[Tensor, " removals"], measured: Mapping[int, float]
) -> Float[Tensor, " removals"]:
    """The loss [nats] for every number of removed units of a group, from 0 to all.

    It grows with the square of the removed units, through the value at a QUARTER of them (the
    geometric mean of estimate and measurement, whose errors are independent), and is no lower than
    what was measured beyond. That is more than a group loses when it is pruned alone, and
    meant so: in a plan its neighbours are pruned as well, and plans made from the curves of single
    groups take too much from the few that look cheap. Groups of at most NARROW units have their
    measured values, and between them the estimate, scaled to join them. The last unit is an
    exception: a few units of a block often carry most of it, so dropping it has its own value.

    Args:
        estimate: second-order estimate for every number of removed units.
        measured: number of removed units -> measured loss; the estimate stands for what is missing.
    """
    width = len(estimate) - 1
    points = {k: max(value, FLOOR) for k, value in measured.items()}
    inner = {k: value for k, value in points.items() if k < width}
    joined = _joined(estimate, inner)
    quarter = min(units_at(QUARTER, width), max(1, width - 1))
    curve = joined.clone()
    if width > NARROW:
        square = torch.arange(width + 1, dtype=torch.float64) / quarter
        curve = (joined[quarter] * estimate[quarter].double().clamp_min(FLOOR)).sqrt()
        curve = curve * square.square()
        if len(inner) > 1:
            curve[quarter:] = torch.maximum(curve[quarter:], joined[quarter:])
    curve[width] = points.get(width, max(float(joined[width]), float(curve[width])))
    return curve


def _joined(
    estimate: Float[Tensor, " removals"], points: Mapping[int, float]
) -> Float[Tensor, " removals"]:
    """The estimate times a factor that makes it meet the points.

    The factor is interpolated on a logarithmic scale, and constant beyond the outermost points.
    """
    curve = estimate.double().clamp_min(FLOOR)
    curve[0] = 0
    if points:
        at = sorted(points)
        factors = [np.log(points[k] / float(curve[k])) for k in at]
        curve *= torch.from_numpy(np.exp(np.interp(range(len(curve)), at, factors)))
    return curve
