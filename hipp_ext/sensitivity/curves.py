"""Sensitivity by removed units, and the levels at which it is kept."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

# Removed fractions of a group's units; at 1 the block is dropped. Where units lie in sections, a
# curve counts those of one section: the others lose as many.
LEVELS = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
ANCHOR_LEVEL = 0.5  # where the size of a curve is taken
NARROW = 8  # units: groups of at most so many have curves of their own shapes
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

    It goes through the measured points; where a group is not measured, through the estimate at
    ANCHOR_LEVEL. Between the points and beyond them it grows with the square of the removed units.
    A group that is pruned alone loses less than that where many units go. In a plan its neighbours
    are pruned too, and plans made from the exact curves of single groups took too much from the few
    groups that look cheap (evals/studies/LOG.md). Groups of at most NARROW units have the shape of
    the estimate instead.

    Args:
        estimate: second-order estimate for every number of removed units.
        measured: number of removed units -> measured loss.
    """
    width = len(estimate) - 1
    points, shape = dict(measured), estimate.double()
    if width > NARROW:
        shape = torch.arange(width + 1, dtype=torch.float64).square()
        anchor = units_at(ANCHOR_LEVEL, width)
        points = points or {anchor: float(estimate[anchor])}
    curve = _joined(shape, points)
    if width not in points:  # a few units often carry most of a block
        curve[width] = max(float(curve[width]), float(estimate[width]))
    return curve


def _joined(
    shape: Float[Tensor, " removals"], points: Mapping[int, float]
) -> Float[Tensor, " removals"]:
    """The shape times a factor that makes it meet the points.

    The factor is interpolated on a logarithmic scale, and constant beyond the outermost points.
    """
    curve = shape.clamp_min(FLOOR)
    curve[0] = 0
    if points:
        at = sorted(points)
        factors = [np.log(max(points[k], FLOOR) / float(curve[k])) for k in at]
        curve *= torch.from_numpy(np.exp(np.interp(range(len(curve)), at, factors)))
    return curve
