"""What counts as a yes, a no, or as not shown. The rules were written before anything was measured.

A difference is shown when it is more than two standard errors away from zero. It is shown to be
missing when a difference that matters, MARGIN, is more than two standard errors away from it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hipp_ext.evals.studies.smolworld.table.rates import Measured

Answer = Literal["yes", "no", "not shown"]
ERRORS = 2.0  # standard errors
MARGIN = 1.0  # percentage points that matter


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A question with its answer.

    Attributes:
        question: the question.
        rule: when it is answered yes, and when no.
        answer: the answer.
        figures: what was measured, by name: a difference with its error, or a plain value.
    """

    question: str
    rule: str
    answer: Answer
    figures: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The values as JSON holds them; of a difference [value, standard error]."""
        figures = {
            name: [round(own.value, 3), round(own.se, 3)] if isinstance(own, Measured) else own
            for name, own in self.figures.items()
        }
        return {"question": self.question, "answer": self.answer, "rule": self.rule} | {
            "figures": figures
        }


def answered(gain: Measured, margin: float = MARGIN) -> Answer:
    """Whether there is a gain.

    "yes": it is above 0 by more than two standard errors. "no": a gain of `margin` is above it by
    more than two. Where both hold, there is a gain, and it is small: "yes".
    """
    if not (math.isfinite(gain.value) and math.isfinite(gain.se)):
        return "not shown"
    if gain.value - ERRORS * gain.se > 0:
        return "yes"
    return "no" if gain.value + ERRORS * gain.se < margin else "not shown"


def told(what: str) -> str:
    """The rule of `answered` in words."""
    return (
        f"yes: {what} of more than {ERRORS:g} standard errors. no: {MARGIN:g} point is more than "
        f"{ERRORS:g} above it."
    )


def all_of(answers: Sequence[Answer]) -> Answer:
    """ "yes" if all are, "no" if one is."""
    if "no" in answers:
        return "no"
    return "yes" if set(answers) == {"yes"} else "not shown"


def any_of(answers: Sequence[Answer]) -> Answer:
    """ "yes" if one is, "no" if all are."""
    if "yes" in answers:
        return "yes"
    return "no" if set(answers) == {"no"} else "not shown"


def mean_of(measured: Sequence[Measured]) -> Measured:
    """The mean of figures from the same pictures; its error is the largest that it can have, the
    mean of theirs."""
    n = len(measured)
    return Measured(value=sum(m.value for m in measured) / n, se=sum(m.se for m in measured) / n)
