"""GlobalThreshold: one threshold over the scores of all units."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from hipp_ext.allocators.base import Allocator
from hipp_ext.allocators.levels import Levels
from hipp_ext.budget import Bounds
from hipp_ext.scorers.base import Groups, Scores
from hipp_ext.units import unit_order


@dataclass(frozen=True, kw_only=True)
class GlobalThreshold(Allocator):
    """Keeps the units with the highest scores of all groups, until the budget is spent.

    Scores are divided by the mean of their group.

    Source: torch-pruning's `global_pruning` with importances normalised by their mean
    (`normalizer="mean"`).
    Differs from it: torch-pruning sets the threshold by the fraction of units; here units go until
    the fraction of parameters is met, so that a unit of 8,192 parameters counts for more than one
    of 384.
    """

    def keep_counts(self, groups: Groups, scores: Scores, measured: Any) -> tuple[int, ...]:
        scaled = {
            g.name: (s := scores[g.name].double()) / s.mean().clamp_min(1e-30) for g in groups
        }
        return counts_by_threshold(groups, scaled, self.pruning_ratio, self.bounds)


def counts_by_threshold(
    groups: Groups, scores: Scores, pruning_ratio: float, bounds: Bounds | None
) -> tuple[int, ...]:
    """Keep counts that leave the units with the highest of all scores.

    Where a step of a group is several units, it is worth the mean of their scores.
    """
    levels, values = Levels.of(groups, bounds or Bounds()), []
    for group, counts in zip(groups, levels.counts, strict=True):
        of_units = scores[group.name].double()
        ranked = of_units[unit_order(of_units, group.sections)].numpy()
        total = np.append(0.0, np.cumsum(ranked))[counts]
        values.append(np.diff(total) / np.diff(counts))
    return levels.fill(levels.least, levels.budget(pruning_ratio), values)
