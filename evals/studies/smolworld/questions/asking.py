"""The questions that the test split answers, from the answers of the models that were measured."""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hipp_ext.evals.studies.smolworld.questions.needed import (
    HALF,
    HALVED,
    QUANTISED,
    W8A8,
    WIDELY,
    plain,
    seeded,
)
from hipp_ext.evals.studies.smolworld.questions.rules import (
    ERRORS,
    MARGIN,
    Answer,
    Finding,
    all_of,
    answered,
    any_of,
    mean_of,
)
from hipp_ext.evals.studies.smolworld.table.asked import Asked
from hipp_ext.evals.studies.smolworld.table.cells import CORNERS, RATIOS, Cell
from hipp_ext.evals.studies.smolworld.table.methods import (
    FITTED,
    SIGNAL_SHUFFLED,
    UNIFORM,
    UNTRAINED,
    VISUAL,
    VISUAL_SHUFFLED,
)
from hipp_ext.evals.studies.smolworld.table.rates import Measured, Rates

POPE, CHOICE = "POPE accuracy overall", "choice"
FALSE_YES, CHAIR = "POPE false yes overall", "CHAIR_i"
EQUAL = 2.0  # points of multiple choice that a model may be away from dense
COMPOSED = 2.0  # points that half of the picture may cost a pruned model more than the dense one
DESTROYED = 10.0  # points: where it costs the dense model more, nothing can be said


class Contrasts:
    """Differences between measured models.

    Args:
        rows: of `TableStudy.rows`.
        asked: the questions of the test.
        seeds: number of fits of a corner.
    """

    def __init__(self, rows: Mapping[str, Any], asked: Asked, seeds: int):
        self._rates, self.seeds = Rates(asked), seeds
        self._values = {name: row["values"] for name, row in rows.items()}

    def __call__(self, terms: Sequence[tuple[float, Sequence[Cell]]]) -> dict[str, Measured]:
        """The weighted sum of the mean rates of groups of cells."""
        return self._rates.contrast(
            [
                (weight / len(cells), self._values[cell.name])
                for weight, cells in terms
                for cell in cells
            ]
        )

    def minus(self, one: Sequence[Cell], other: Sequence[Cell]) -> dict[str, Measured]:
        """The mean rates of the first cells minus those of the others.

        Where the first ones are several seeds, the spread over the seeds adds to the error.
        """
        whole = self([(1.0, one), (-1.0, other)])
        seeds = len({cell.seed for cell in one})
        if seeds == 1:
            return whole
        pairs = zip(one, other if len(other) == len(one) else list(other) * len(one), strict=True)
        each = [self([(1.0, [a]), (-1.0, [b])]) for a, b in pairs]
        return {
            name: replace(own, se=math.hypot(own.se, _spread([e[name].value for e in each])))
            for name, own in whole.items()
        }


def hallucination(contrasts: Contrasts) -> Finding:
    """Question a."""
    chosen = []
    for method, repair in itertools.product(WIDELY, ("none", "reconstruct")):
        cells = [Cell(method=method, ratio=r, repair=repair) for r in RATIOS]
        equal = [c for c in cells if abs(contrasts.minus([c], [Cell()])[CHOICE].value) <= EQUAL]
        chosen += equal[-1:]
    figures: dict[str, Any] = {"models": [c.title for c in chosen]}
    answer: Answer = "not shown"
    if chosen:
        change = contrasts.minus(chosen, [Cell()])
        rise = mean_of([change[FALSE_YES], change[CHAIR]])
        answer = answered(rise)
        figures |= {"rise": rise} | {n: change[n] for n in (FALSE_YES, CHAIR, POPE, CHOICE)}
    return Finding(
        question="Does pruning raise hallucination at equal task accuracy?",
        rule=(
            f"Of {', '.join(WIDELY)}, each alone and reconstructed, the model of the largest ratio "
            f"whose multiple choice is within {EQUAL:g} points of dense. The rise is the mean over "
            "these models of what they say more than dense that is not there: the mean of false "
            "yes (absent things that are said to be there) and CHAIR_i. " + told("a rise")
        ),
        answer=answer,
        figures=figures,
    )


def steering(contrasts: Contrasts) -> Finding:
    """Question b."""
    useful, robust = (
        seeded(FITTED, corner, contrasts.seeds) for corner in ("utility", "robustness")
    )
    change = contrasts.minus(useful, robust)
    gains = {
        "multiple choice, utility minus robustness": change[CHOICE],
        "POPE accuracy, robustness minus utility": Measured(
            value=-change[POPE].value, se=change[POPE].se
        ),
    }
    return Finding(
        question="Does a preference steer at 30%?",
        rule=(
            "The gain of each corner over the other on its own task, mean over fits. yes: both "
            f"gains are more than {ERRORS:g} standard errors above 0. no: of one of them "
            f"{MARGIN:g} point is more than {ERRORS:g} above it."
        ),
        answer=all_of([answered(gain) for gain in gains.values()]),
        figures=gains,
    )


def visual(contrasts: Contrasts) -> Finding:
    """Question c."""
    fitted, shuffled = (
        seeded(method, "robustness", contrasts.seeds) for method in (FITTED, SIGNAL_SHUFFLED)
    )
    scored, mixed, wanda = ([plain(m)] for m in (VISUAL, VISUAL_SHUFFLED, UNIFORM))
    gains = {
        "as a signal, minus its shuffle": contrasts.minus(fitted, shuffled)[POPE],
        "as a scorer, minus its shuffle": contrasts.minus(scored, mixed)[POPE],
        "as a scorer, minus WandaSP": contrasts.minus(scored, wanda)[POPE],
    }
    signal, over_shuffle, over_wanda = map(answered, gains.values())
    return Finding(
        question="Does visual sensitivity help at 30 layers?",
        rule=(
            "Gains in POPE accuracy at 30%. yes: as a signal of the fit for robustness it gains "
            "over its shuffle, or as a scorer over its shuffle and over WandaSP, by more than "
            f"{ERRORS:g} standard errors. no: neither gains {MARGIN:g} point, by as many."
        ),
        answer=any_of([signal, all_of([over_shuffle, over_wanda])]),
        figures=gains,
    )


def fitting(contrasts: Contrasts, evaluations: int, curves: Mapping[str, Any]) -> Finding:
    """Question e.

    Args:
        contrasts: the measured models.
        evaluations: plans that a fit evaluated.
        curves: what searches reached on the search split, see `best_so_far`.
    """
    gains: dict[str, Measured] = {}
    for corner in CORNERS:
        change = contrasts.minus(
            seeded(FITTED, corner, contrasts.seeds), [plain(UNTRAINED, corner=corner)]
        )
        own = {"utility": [CHOICE], "robustness": [POPE]}.get(corner, [CHOICE, POPE])
        gains[corner] = mean_of([change[name] for name in own])
    whole = mean_of(list(gains.values()))
    return Finding(
        question="Does a fit add to sensitivity alone?",
        rule=(
            "The gain of the fitted over the untrained planner at 30%, of each corner on its own "
            "task and of the middle on both, mean over the three and over fits. " + told("a gain")
        ),
        answer=answered(whole),
        figures={
            "gain": whole,
            "gain per ten evaluations": round(10 * whole.value / evaluations, 4),
            **{f"gain, {corner}": gain for corner, gain in gains.items()},
            "on the search split": curves,
        },
    )


def composing(contrasts: Contrasts) -> Finding:
    """Question f."""
    pruned = [plain(m, repair="reconstruct") for m in HALVED]
    half = [replace(cell, variant=HALF) for cell in pruned]
    dense, seeing = [Cell()], [Cell(variant=HALF)]
    own, theirs = contrasts.minus(half, pruned), contrasts.minus(seeing, dense)
    more = contrasts([(1.0, half), (-1.0, pruned), (-1.0, seeing), (1.0, dense)])
    names = (POPE, "choice with picture")
    extra = mean_of([more[name] for name in names])
    alone = mean_of([theirs[name] for name in names])
    answer: Answer = "not shown"
    if alone.value > -DESTROYED:
        shifted = Measured(value=extra.value + COMPOSED, se=extra.se)
        answer = answered(shifted, margin=COMPOSED)
    return Finding(
        question="Do pruning and keeping half of the picture's tokens compose?",
        rule=(
            "What half of the tokens costs reconstructed models of 30% more than the dense one, "
            "mean of POPE accuracy and multiple choice with a picture. yes: the extra cost is "
            f"below {COMPOSED:g} points by more than {ERRORS:g} standard errors. no: it is above 0 "
            f"by as many. Where it costs the dense model more than {DESTROYED:g} points, nothing "
            "is shown."
        ),
        answer=answer,
        figures={
            "extra change of the pruned": extra,
            "change of the dense": alone,
            "change of the pruned": mean_of([own[name] for name in names]),
        },
    )


def quantising(contrasts: Contrasts) -> Finding:
    """Question g."""
    before = {m: plain(m, repair="reconstruct") for m in QUANTISED}
    after = {m: replace(cell, variant=W8A8) for m, cell in before.items()}
    apart, kept, turned = [], [], []
    for one, other in itertools.combinations(QUANTISED, 2):
        first, then = (
            mean_of([contrasts.minus([own[one]], [own[other]])[n] for n in (POPE, CHOICE)])
            for own in (before, after)
        )
        if abs(first.value) <= ERRORS * first.se:
            continue
        pair = f"{one} and {other}"
        apart.append(pair)
        if first.value * then.value > 0:
            kept.append(pair)
        elif abs(then.value) > ERRORS * then.se:
            turned.append(pair)
    answer: Answer = "not shown"
    if turned:
        answer = "yes"
    elif apart and len(kept) == len(apart):
        answer = "no"
    cost = contrasts.minus(list(after.values()), list(before.values()))
    dense = contrasts.minus([Cell(variant=W8A8)], [Cell()])
    return Finding(
        question="Does W8A8 after pruning change the order of the methods?",
        rule=(
            "Pairs of reconstructed models of 30% that are apart before, by more than "
            f"{ERRORS:g} standard errors in the mean of POPE accuracy and multiple choice. yes: "
            "one of them is apart the other way round after it. no: there are some, and all keep "
            "their order."
        ),
        answer=answer,
        figures={
            "pairs apart": len(apart),
            "pairs that keep their order": len(kept),
            "turned round": turned,
            "cost to pruned models": mean_of([cost[n] for n in (POPE, CHOICE)]),
            "cost to the dense model": mean_of([dense[n] for n in (POPE, CHOICE)]),
        },
    )


def _spread(values: Sequence[float]) -> float:
    """Standard error of the mean of the values."""
    return statistics.stdev(values) / len(values) ** 0.5


def told(what: str) -> str:
    """The rule of `answered` in words."""
    return (
        f"yes: {what} of more than {ERRORS:g} standard errors. no: {MARGIN:g} point is more than "
        f"{ERRORS:g} above it."
    )


ON_TEST: Mapping[str, Callable[[Contrasts], Finding]] = {
    "a": hallucination,
    "b": steering,
    "c": visual,
    "f": composing,
    "g": quantising,
}
