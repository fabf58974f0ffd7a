"""How much of every group stays, without a search: (what was measured of a model, pruning_ratio) -> keep counts.

Within a group all of them remove the units with the lowest scores of the context; they differ in how many. All meet the
budget within one step of one group, never above it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from hipp_ext.budget import Bounds, check_ratio, keep_counts
from hipp_ext.calibration import Batch
from hipp_ext.evals.studies.search.levels import Levels
from hipp_ext.evals.studies.search.sensitivity import SensitivityTable, cheapest, measure_table
from hipp_ext.groups import Group, total_parameters
from hipp_ext.scorers.base import InputMoments, consumer_weight, input_moments, per_unit
from hipp_ext.scorers.flap import fluctuation
from hipp_ext.units import check_scores

OWL_THRESHOLD = 5.0  # M: an outlier is above this many times the mean
OWL_BAND = 0.08  # lambda


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """A model and what the allocators measure of it, once, when first asked for.

    Attributes:
        model: left as it was found.
        batches: calibration.
        groups: what is pruned.
        scores: group name -> score per unit (WandaSP's), which ranks the units.
        bounds: of the keep counts.
    """

    model: nn.Module
    batches: Sequence[Batch]
    groups: tuple[Group, ...]
    scores: Mapping[str, Tensor]
    bounds: Bounds = Bounds()

    def __post_init__(self) -> None:
        check_scores(self.groups, self.scores)

    @cached_property
    def levels(self) -> Levels:
        """The allowed keep counts."""
        return Levels.of(self.groups, self.bounds)

    @cached_property
    def moments(self) -> dict[str, InputMoments]:
        """Group name -> moments of its consumer's inputs."""
        return input_moments(self.model, self.groups, self.batches)

    @cached_property
    def outliers(self) -> np.ndarray:
        """(G,) share of outliers among |W| * ||x||_2 of each group's consumer, see `owl`."""
        return np.array(
            [_outlier_share(self.model, g, self.moments[g.name].norm) for g in self.groups]
        )

    @cached_property
    def sensitivity(self) -> SensitivityTable:
        """KL from dense per group and keep count; `evaluations` says what it took."""
        return measure_table(self.model, self.batches, self.groups, self.scores, self.levels)


Allocator = Callable[[Context, float], tuple[int, ...]]


def uniform(context: Context, ratio: float) -> tuple[int, ...]:
    """The same share of every group."""
    return keep_counts(context.groups, None, ratio, context.bounds)


def global_threshold(context: Context, ratio: float) -> tuple[int, ...]:
    """One threshold over all units, scores divided by the mean of their group; the lowest go until the budget is met.

    Source: torch-pruning's `global_pruning` with importances normalised by their mean (`normalizer="mean"`).
    Differs from it: torch-pruning sets the threshold by the share of units; here units go until the share of parameters is
    met, so a unit of 8,192 parameters counts for more than one of 384.
    """
    scores = {
        name: score.double() / score.double().mean().clamp_min(1e-30)
        for name, score in context.scores.items()
    }
    return _by_threshold(context, scores, ratio)


def flap_adaptive(context: Context, ratio: float) -> tuple[int, ...]:
    """One threshold over all units by FLAP's fluctuation metric, standardised over the channels of each group.

    The metric of a head is the mean over its channels after they were standardised.

    Source: FLAP (arXiv 2312.11983), section 3, adaptive structure search ("AL-AM").
    Differs from the paper: the metric decides how many units of a group stay; which ones stay is up to the scores of the
    context, as for the other allocators. No bias compensation: it is a repair, and would help every allocator. The published
    code squares the metric in attention before it is standardised; the paper does not speak of it, nor does this.
    """
    scores = {}
    for group in context.groups:
        channels = fluctuation(context.model, group, context.moments[group.name])
        standard = (channels - channels.mean()) / channels.std(unbiased=False).clamp_min(1e-30)
        scores[group.name] = per_unit(standard, group).mean(1)
    return _by_threshold(context, scores, ratio)


def owl(context: Context, ratio: float) -> tuple[int, ...]:
    """More of a group stays the more outliers it has: shares in a band of width 2 * lambda whose mean is the budget.

    An outlier is an element of |W| * ||x||_2 above M = 5 times the mean of its matrix; lambda = 0.08.

    Source: OWL (arXiv 2310.05175), section 3, and its published code for the placing of the band.
    Differs from the paper: made for unstructured pruning of whole layers. Here a share belongs to a group, the outliers are
    counted in the group's consumer (o_proj, down_proj) alone, the mean is weighted by parameters, and the share counts units.
    Where a share would exceed 1 it is clipped, and the others move together to meet the budget.
    """
    check_ratio(ratio)
    outliers = context.outliers
    spread = outliers - outliers.min()
    if spread.max() > 0:
        spread = spread / spread.max() * 2 * OWL_BAND
    weight = np.array([g.parameters for g in context.groups]) / total_parameters(context.groups)
    share = np.clip(1 - ratio + spread - weight @ spread, 1e-6, 1 - 1e-6)
    return keep_counts(context.groups, np.log(share / (1 - share)), ratio, context.bounds)


def sensitivity_dp(context: Context, ratio: float) -> tuple[int, ...]:
    """The keep counts whose measured losses sum to the least within the budget, by an exact knapsack.

    The loss of a group is the KL of the answers from dense when it alone is pruned; see `SensitivityTable`. What the optimum
    leaves of the budget goes to the climbs that lower the summed loss most per parameter.

    Source: the idea is old (HAWQ-V3, arXiv 2011.10680; Puzzle, arXiv 2411.19146): measure each layer alone, then solve.
    """
    levels, losses = context.levels, context.sensitivity.losses
    budget = levels.budget(ratio)
    prices = [cost * counts for cost, counts in zip(levels.costs, levels.counts, strict=True)]
    chosen = cheapest(prices, losses, budget)
    keeps = [int(counts[i]) for counts, i in zip(levels.counts, chosen, strict=True)]
    gains = [-np.diff(loss) / np.diff(price) for loss, price in zip(losses, prices, strict=True)]
    return levels.fill(keeps, budget, gains)


ALLOCATORS: dict[str, Allocator] = {
    "uniform": uniform,
    "global threshold": global_threshold,
    "FLAP adaptive": flap_adaptive,
    "OWL": owl,
    "sensitivity+DP": sensitivity_dp,
}


def _by_threshold(context: Context, scores: Mapping[str, Tensor], ratio: float) -> tuple[int, ...]:
    """Keep counts that leave the units with the highest scores of all groups; a level is worth the mean of its units."""
    values = []
    for group, counts in zip(context.groups, context.levels.counts, strict=True):
        ranked = np.sort(scores[group.name].double().numpy())[::-1]
        total = np.append(0.0, np.cumsum(ranked))[counts]
        values.append(np.diff(total) / np.diff(counts))
    return context.levels.fill(context.levels.least, context.levels.budget(ratio), values)


@torch.no_grad()
def _outlier_share(model: nn.Module, group: Group, input_norm: Tensor) -> float:
    weight = consumer_weight(model, group)
    importance = weight.abs().float() * input_norm.to(weight.device).float()
    return float((importance > OWL_THRESHOLD * importance.mean()).float().mean())
