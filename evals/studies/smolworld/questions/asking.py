"""The questions on pruning that the answers to the test settle."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hipp_ext.evals.studies.smolworld.questions.contrasts import CHOICE, POPE, Contrasts
from hipp_ext.evals.studies.smolworld.questions.needed import WIDELY, plain, seeded
from hipp_ext.evals.studies.smolworld.questions.rules import (
    ERRORS,
    MARGIN,
    Answer,
    Finding,
    all_of,
    answered,
    any_of,
    mean_of,
    told,
)
from hipp_ext.evals.studies.smolworld.questions.variants import composing, quantising
from hipp_ext.evals.studies.smolworld.table.cells import CORNERS, RATIOS, Cell
from hipp_ext.evals.studies.smolworld.table.methods import (
    FITTED,
    SIGNAL_SHUFFLED,
    UNIFORM,
    UNTRAINED,
    VISUAL,
    VISUAL_SHUFFLED,
)
from hipp_ext.evals.studies.smolworld.table.rates import Measured

FALSE_YES, CHAIR = "POPE false yes overall", "CHAIR_i"
EQUAL = 2.0  # points of multiple choice that a model may be away from dense


def hallucination(contrasts: Contrasts) -> Finding:
    """Question a."""
    chosen = []
    for method, repair in itertools.product(WIDELY, ("none", "reconstruct")):
        cells = [Cell(method=method, ratio=r, repair=repair) for r in RATIOS]
        known = filter(contrasts.has, cells)
        equal = [c for c in known if abs(contrasts.minus([c], [Cell()])[CHOICE].value) <= EQUAL]
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
    fits = [seeded(FITTED, corner, contrasts.seeds) for corner in ("utility", "robustness")]
    untrained = [[plain(UNTRAINED, corner=corner)] for corner in ("utility", "robustness")]
    gains = _corner_gains(contrasts, *fits)
    return Finding(
        question="Does a preference steer at 30%?",
        rule=(
            "The gain of each corner of the fitted planner over the other on its own task, mean "
            f"over fits. yes: both gains are more than {ERRORS:g} standard errors above 0. no: of "
            f"one of them {MARGIN:g} point is more than {ERRORS:g} above it."
        ),
        answer=all_of([answered(gain) for gain in gains.values()]),
        figures=gains
        | {f"untrained: {n}": g for n, g in _corner_gains(contrasts, *untrained).items()},
    )


def _corner_gains(
    contrasts: Contrasts, useful: Sequence[Cell], robust: Sequence[Cell]
) -> dict[str, Measured]:
    change = contrasts.minus(useful, robust)
    pope = change[POPE]
    return {
        "multiple choice, utility minus robustness": change[CHOICE],
        "POPE accuracy, robustness minus utility": Measured(value=-pope.value, se=pope.se),
    }


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
            f"over its shuffle (seeds of fits: {contrasts.seeds}), or as a scorer over its shuffle "
            f"and over WandaSP, by more than {ERRORS:g} standard errors. no: neither gains "
            f"{MARGIN:g} point, by as many."
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


ON_TEST: Mapping[str, Callable[[Contrasts], Finding]] = {
    "a": hallucination,
    "b": steering,
    "c": visual,
    "f": composing,
    "g": quantising,
}
