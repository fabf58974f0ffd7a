"""What is measured of every group, and on how much of the calibration."""

from collections.abc import Sequence

from hipp_ext.groups import Group
from hipp_ext.sensitivity.curves import ANCHOR_LEVEL, units_at
from hipp_ext.sensitivity.measured import Point

# Level -> forward passes over the calibration that all groups together may cost there.
PASSES = {ANCHOR_LEVEL: 6.0, 1.0: 1.5}
MEASURED_LEVELS = (0.125, 0.25, 0.5, 0.75, 1.0)


def points_at(groups: Sequence[Group], levels: Sequence[float]) -> list[Point]:
    """The points of all groups nearest to these levels, each once."""
    return [
        Point(group=g, removed=k)
        for g in groups
        for k in dict.fromkeys(_removed(g, level) for level in levels)
        if k
    ]


def _removed(group: Group, level: float) -> int:
    """Number of removed units nearest to a level with which the block works; it may be none."""
    removed = units_at(level, group.width // group.sections) * group.sections
    most = (group.width - group.least) // group.sections * group.sections
    return removed if removed == group.width else min(removed, most)


def affordable(points: Sequence[Point], layers: int, passes: float) -> float:
    """The fraction of the calibration on which `points` cost at most so many forward passes."""
    return min(1.0, passes / passes_of(points, layers))


def passes_of(points: Sequence[Point], layers: int) -> float:
    """Forward passes over the calibration that `points` cost in a language tower of `layers`.

    A point costs a pass through its own layer and those above it, and the dense model runs once.
    Before the language tower it is a whole pass.
    """
    first = [p.group.layer if p.group.tower == "language" else 0 for p in points]
    return 1 + sum((layers - layer) / layers for layer in first)
