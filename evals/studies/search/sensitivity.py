"""Measured sensitivity of every group at several keep counts, and the exact cheapest choice of one count per group."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from hipp_ext.answers import AnswerLogits
from hipp_ext.calibration import Batch
from hipp_ext.errors import BudgetError
from hipp_ext.evals.studies.search.levels import Levels
from hipp_ext.groups import Group
from hipp_ext.planner.state import divergence
from hipp_ext.units import plan_from_counts

PARTS = 8  # a group is measured with 1/8 ... 7/8 of its units removed, and at its floor
MOST_WORK = 2 * 10**10  # additions of one knapsack, about a minute


@dataclass(frozen=True, kw_only=True, eq=False)
class SensitivityTable:
    """What pruning one group alone does to the answers.

    Attributes:
        losses: for every group, one KL divergence [nats] from dense per level of its ladder; 0 where nothing goes.
        evaluations: passes over the calibration data that measuring took, the dense model's included.
    """

    losses: tuple[np.ndarray, ...]
    evaluations: int


def measure_table(
    model: nn.Module,
    batches: Sequence[Batch],
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    levels: Levels,
) -> SensitivityTable:
    """The table of `model`: mean KL of the answer distribution from dense, measured at up to PARTS levels per group.

    Levels between are interpolated linearly. The model is masked while it is measured, otherwise left alone.
    """
    answers = AnswerLogits(model, batches)
    dense = answers(model).log_softmax(-1)
    evaluations, losses = 1, []
    for i, group in enumerate(groups):
        ladder = levels.counts[i]
        wanted = [group.width * (1 - part / PARTS) for part in range(1, PARTS)]
        nearest = {int(ladder[np.abs(ladder - w).argmin()]) for w in wanted} | {int(ladder[0])}
        measured = sorted(nearest - {group.width})
        kl = []
        for keep in measured:
            counts = [keep if g is group else g.width for g in groups]
            kl.append(
                float(
                    divergence(model, plan_from_counts(groups, counts, scores), answers, dense)
                    .mean()
                    .clamp_min(0)
                )
            )
        evaluations += len(measured)
        losses.append(np.interp(ladder, [*measured, group.width], [*kl, 0.0]))
    return SensitivityTable(losses=tuple(losses), evaluations=evaluations)


def cheapest(prices: Sequence[np.ndarray], losses: Sequence[np.ndarray], budget: int) -> list[int]:
    """One choice per group with the least sum of losses whose prices sum to at most `budget`: exact.

    A multiple-choice knapsack, by dynamic programming over the budget in units of the prices' greatest common divisor. Among
    equal losses, the dearer choice.

    Args:
        prices: per group, a whole number per choice, ascending.
        losses: per group, a number per choice.
        budget: for all groups together.

    Raises:
        BudgetError: the least prices exceed the budget, or the table is too large to be solved within minutes.
    """
    extras = [np.asarray(p, dtype=np.int64) - int(p[0]) for p in prices]
    spare = budget - sum(int(p[0]) for p in prices)
    if spare < 0:
        raise BudgetError(f"The least prices sum to {budget - spare}, the budget is {budget}.")
    unit = max(1, math.gcd(*(int(e) for extra in extras for e in extra)))
    states, choices = spare // unit + 1, sum(map(len, extras))
    if states * choices > MOST_WORK:
        raise BudgetError(
            f"{states} budgets times {choices} choices are too many for an exact knapsack: set Bounds.round_to, to 64 say."
        )
    best = np.zeros(states)
    taken = []
    for extra, loss in zip(extras, losses, strict=True):
        cost, choice = np.full(states, np.inf), np.zeros(states, dtype=np.int32)
        for i, shift in enumerate(extra // unit):
            reached = best[: states - shift] + loss[i] if shift < states else best[:0]
            better = reached <= cost[shift:]
            cost[shift:][better], choice[shift:][better] = reached[better], i
        taken.append(choice)
        best = cost
    chosen, state = [], states - 1
    for extra, choice in zip(reversed(extras), reversed(taken), strict=True):
        chosen.append(int(choice[state]))
        state -= int(extra[chosen[-1]]) // unit
    return chosen[::-1]
