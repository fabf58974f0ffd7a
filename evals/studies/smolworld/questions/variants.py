"""The questions on what else is done to pruned models: fewer tokens of a picture, and 8 bits."""

import itertools
from dataclasses import replace

from hipp_ext.evals.studies.smolworld.questions.contrasts import CHOICE, POPE, Contrasts
from hipp_ext.evals.studies.smolworld.questions.needed import HALF, HALVED, QUANTISED, W8A8, plain
from hipp_ext.evals.studies.smolworld.questions.rules import (
    ERRORS,
    Answer,
    Finding,
    answered,
    mean_of,
)
from hipp_ext.evals.studies.smolworld.table.cells import Cell
from hipp_ext.evals.studies.smolworld.table.rates import Measured

COMPOSED = 2.0  # points that half of the picture may cost a pruned model more than the dense one
DESTROYED = 10.0  # points: where it costs the dense model more, nothing can be said


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
            "is shown. The patches are those that the other patches attend to most."
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
