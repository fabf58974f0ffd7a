"""How much better or worse a model is than another on the same questions, in all and by parts.

A part is a split, a category, or all questions with one right answer. Looking at many parts for the
worst one finds a difference by chance, so their intervals are widened for the number of parts
(Bonferroni).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hipp_ext.evals.runs import Run
from hipp_ext.evals.statistics import Estimate, cluster_sums, paired_difference
from hipp_ext.evals.tables import YES_NO

LEVEL = 0.95  # of the interval of a whole data set, and of all parts of a model together
# Models that differ on fewer pictures than this are never told apart: the exact sign test of five
# pictures that all go one way has p = 0.06.
MIN_DIFFERING = 6
MIN_CLUSTERS = 10  # of a part; smaller parts are left out
MAX_PARTS = 24  # of a data set, the largest ones; with more the bootstrap would need more draws


@dataclass(frozen=True, kw_only=True)
class Change:
    """How much a score of B differs from that of A.

    Attributes:
        data: name of the data set.
        part: the part of the data set; "" is all of it.
        n: number of questions (or captions).
        differing: number of pictures, or of questions that stand alone, on which the models differ.
        a, b: the scores [%].
        difference: B - A [percentage points], with the interval at `level`.
        level: confidence level of the interval.
        higher_is_better: whether a higher score is better.
    """

    data: str
    part: str = ""
    n: int
    differing: int
    a: float
    b: float
    difference: Estimate
    level: float = LEVEL
    higher_is_better: bool = True

    @property
    def told_apart(self) -> bool:
        """Whether the interval excludes 0, and there are enough pictures to say so."""
        low, high = self.difference.low, self.difference.high
        return self.differing >= MIN_DIFFERING and (low > 0 or high < 0)

    @property
    def loss(self) -> float:
        """By how many points B is worse; negative where it is better."""
        return -self.difference.value if self.higher_is_better else self.difference.value

    @property
    def worse(self) -> bool:
        """Whether B is worse, and the two are told apart."""
        return self.told_apart and self.loss > 0


def parts_of(run: Run) -> dict[str, list[int]]:
    """Part of a data set -> the rows of its questions. A part that is all of it is left out."""
    found: dict[str, list[int]] = {}
    for row, question in enumerate(run.questions):
        names = [name for name in question.category.split(",") if name]
        if question.kind == YES_NO:
            names.append(f"answer is {question.label}")
        for name in dict.fromkeys(names):
            found.setdefault(name, []).append(row)
    large = {
        name: rows
        for name, rows in found.items()
        if len(rows) < len(run.questions)
        and len({run.questions[row].cluster for row in rows}) >= MIN_CLUSTERS
    }
    most = sorted(large, key=lambda name: len(large[name]), reverse=True)[:MAX_PARTS]
    return {name: rows for name, rows in large.items() if name in most}


def changes(pairs: Iterable[tuple[Run, Run]]) -> list[tuple[Change, list[Change]]]:
    """For every data set the change in all and by parts, by VLMEvalKit's rule.

    Args:
        pairs: answers of A and of B to the same questions, one pair per data set.
    """
    both = [(a, b, parts_of(a)) for a, b in pairs]
    number = sum(len(parts) for _, _, parts in both)
    level = 1 - (1 - LEVEL) / max(number, 1)
    return [
        (
            _change(a, b, "", range(len(a.questions)), LEVEL),
            [_change(a, b, name, rows, level) for name, rows in parts.items()],
        )
        for a, b, parts in both
    ]


def _change(a: Run, b: Run, part: str, rows: Sequence[int], level: float) -> Change:
    questions = [a.questions[row] for row in rows]
    correct = [
        [q.prediction(run.answers[row]) == q.label for row, q in zip(rows, questions, strict=True)]
        for run in (a, b)
    ]
    clusters = [q.cluster for q in questions]
    paired = paired_difference(correct[0], correct[1], clusters, level=level)
    gain = np.subtract(correct[1], correct[0], dtype=float)[:, None]
    return Change(
        data=a.data,
        part=part,
        n=paired.n,
        differing=int(np.count_nonzero(cluster_sums(gain, clusters))),
        a=paired.a,
        b=paired.b,
        difference=paired.difference,
        level=level,
    )


def interval_known(change: Change) -> bool:
    """Whether there are enough pictures for an interval."""
    return not math.isnan(change.difference.low)
