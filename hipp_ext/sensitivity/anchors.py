"""Where sensitivity is measured: which groups at which levels, on which rows."""

from collections.abc import Sequence

from hipp_ext.groups import Group
from hipp_ext.sensitivity.curves import QUARTER, units_at
from hipp_ext.sensitivity.measured import Point
from hipp_ext.sensitivity.replay import CalibrationReplay, ReplayBatch

ANCHOR_LEVELS = (QUARTER, 1.0)
ANCHOR_PASSES = 7.0  # forward passes over the calibration that anchors cost at most
MEASURED_LEVELS = (0.125, 0.25, 0.5, 0.75, 1.0)


def points_at(groups: Sequence[Group], levels: Sequence[float]) -> list[Point]:
    """The points of all groups nearest to these levels, each once."""
    return [
        Point(group=g, removed=k)
        for g in groups
        for k in dict.fromkeys(units_at(level, g.width) for level in levels)
    ]


def anchor_rows(
    replay: CalibrationReplay, points: Sequence[Point], layers: int
) -> tuple[ReplayBatch, ...]:
    """The rows to measure `points` on: as many as ANCHOR_PASSES allow, evenly spaced.

    Where the batches cannot be taken apart they are some of the batches. There is always a row, or
    batch, of each task: of very few rows the points may cost more.
    """
    # The dense model runs on the rows, too.
    cost = 1 + sum((layers - point.group.layer) / layers for point in points)
    fraction = min(1.0, ANCHOR_PASSES / cost)
    if all(batch.divisible for batch in replay.batches):
        return replay.some_rows(fraction)
    return replay.some_batches(fraction)
