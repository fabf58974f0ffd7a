"""Two models' answers to the same questions -> accuracies, their difference with error bar, and what else could be seen.

POPE asks several questions about one picture, so its bootstrap draws pictures; multiple choice draws questions.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hipp_ext.errors import DataError
from hipp_ext.evals.compare_table import ComparisonTable
from hipp_ext.evals.metrics import f1_percent, without_nan
from hipp_ext.evals.pope import RULES
from hipp_ext.evals.runs import AskedQuestion, Run, read_runs
from hipp_ext.evals.scienceqa import option_letter
from hipp_ext.evals.statistics import (
    Estimate,
    PairedDifference,
    bootstrap_estimate,
    paired_difference,
    questions_needed,
)
from hipp_ext.evals.tables import YES_NO
from hipp_ext.files.untrusted import shown

__all__ = [
    "Comparison",
    "check_same_questions",
    "compare",
    "compare_runs",
    "comparison_table",
    "plain",
]

MOST_SPLITS, MOST_OPTIONS = 101, 26  # each split takes a bootstrap; options have letters
POINT = 1.0  # the difference [points] whose price in questions is given


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One data set, one rule for reading answers, one split.

    Attributes:
        data: name of the data set.
        rule: "vlmeval" or "official" (POPE; see `evals.pope`), or "letter" (multiple choice).
        split: "all" (every question once) or one of POPE's splits.
        paired: the accuracies and their difference, B - A.
        f1: difference of the F1 of yes [points], B - A; None for multiple choice.
        yes_a, yes_b: answers yes [%]; None for multiple choice.
        questions_for_a_point: questions that would show a difference of one point (power 80%, level 5%), given the
            discordance and the design effect seen here.
    """

    data: str
    rule: str
    split: str
    paired: PairedDifference
    f1: Estimate | None
    yes_a: float | None
    yes_b: float | None
    questions_for_a_point: int


def compare(
    a: str | Path,
    b: str | Path,
    *,
    tsv: str | Path | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> list[Comparison]:
    """Compare what `vlmeval` left for two models, on every data set that both were asked.

    Args:
        a, b: see `runs.read_runs`.
        tsv: the questions, for predictions without questions.jsonl.
        level: of the intervals.
        seed: of the bootstrap.

    Raises:
        DataError: no data set in common, or different questions; the message says what differs.
    """
    runs_a, runs_b = read_runs(a, tsv), read_runs(b, tsv)
    if (
        len(runs_a) == len(runs_b) == 1
    ):  # files may lie anywhere; the questions say whether they belong together
        pairs = [(*runs_a.values(), *runs_b.values())]
    else:
        pairs = [(run, runs_b[name]) for name, run in runs_a.items() if name in runs_b]
    if not pairs:
        raise DataError(
            f"no data set in common: A has {shown(', '.join(runs_a))}, B has {shown(', '.join(runs_b))}"
        )
    return [row for pair in pairs for row in compare_runs(*pair, level=level, seed=seed)]


def compare_runs(a: Run, b: Run, *, level: float = 0.95, seed: int = 0) -> list[Comparison]:
    """The comparison by each rule and, for yes/no, on each split; all questions first.

    Raises:
        DataError: the questions differ, or there are more splits or options than a benchmark has.
    """
    check_same_questions(a, b)
    asked, rows = a.questions, []
    yes_no = asked[0].kind == YES_NO
    splits = {"all": list(range(len(asked)))}
    for row, question in enumerate(asked):
        for split in dict.fromkeys(question.category.split(",")) if yes_no else ():
            splits.setdefault(split, []).append(row)
    if len(splits) > MOST_SPLITS or any(
        len(question.options or ()) > MOST_OPTIONS for question in asked
    ):
        raise DataError(
            f"{shown(a.data)}: {len(splits) - 1:,} splits, of {MOST_SPLITS - 1} that can be compared, or a question with more "
            f"than {MOST_OPTIONS} options"
        )
    for rule in RULES if yes_no else ("letter",):
        said_a, said_b = (_read(rule, asked, run.answers) for run in (a, b))
        for split, own in splits.items():
            picked = (
                [asked[row] for row in own],
                [said_a[row] for row in own],
                [said_b[row] for row in own],
            )
            rows.append(_compare_split(a.data, rule, split, *picked, level=level, seed=seed))
    return rows


def check_same_questions(a: Run, b: Run) -> None:
    """Raise DataError, with the first difference, unless both runs answer the very same questions."""
    where = f"A ({shown(a.model)} on {shown(a.data)}) and B ({shown(b.model)} on {shown(b.data)}) cannot be compared"
    by_index = {question.index: question for question in b.questions}
    if a.questions == b.questions:
        return
    if len(a.questions) != len(b.questions):
        raise DataError(
            f"{where}: A answers {len(a.questions)} questions and B {len(b.questions)}. Ask both the same"
        )
    for question in a.questions:
        other = by_index.get(question.index)
        if other is None:
            raise DataError(f"{where}: A answers index {shown(question.index)}, B does not")
        for field in ("question", "options", "image", "answer", "category"):
            own, theirs = getattr(question, field), getattr(other, field)
            if own != theirs:
                said = [shown(repr(value), 200) for value in (own, theirs)]
                raise DataError(
                    f"{where}: the {field} of index {shown(question.index)} is {said[0]} in A and {said[1]} in B. "
                    "They were asked different data"
                )
    raise DataError(f"{where}: the questions are in another order. They were asked different data")


def _read(rule: str, asked: Sequence[AskedQuestion], answers: Sequence[str]) -> list[str]:
    """Each answer as "yes", "no" or "unknown"; or as a letter."""
    if rule in RULES:
        return [RULES[rule](answer) for answer in answers]
    return [
        option_letter(answer, question.options or {})
        for question, answer in zip(asked, answers, strict=True)
    ]


def _compare_split(
    data: str,
    rule: str,
    split: str,
    asked: Sequence[AskedQuestion],
    said_a: Sequence[str],
    said_b: Sequence[str],
    *,
    level: float,
    seed: int,
) -> Comparison:
    yes_no = rule in RULES
    labels = [question.answer.lower() if yes_no else question.answer for question in asked]
    right_a, right_b = (
        [said == label for said, label in zip(own, labels, strict=True)] for own in (said_a, said_b)
    )
    # Multiple choice: many questions may share a blank picture without having anything else in common.
    images = [question.image if yes_no else question.index for question in asked]
    paired = paired_difference(right_a, right_b, images, level=level, seed=seed)
    effect = 1.0 if math.isnan(paired.design_effect) else max(1.0, paired.design_effect)
    return Comparison(
        data=data,
        rule=rule,
        split=split,
        paired=paired,
        f1=_f1_difference(said_a, said_b, labels, images, level, seed) if yes_no else None,
        yes_a=100 * sum(said == "yes" for said in said_a) / len(asked) if yes_no else None,
        yes_b=100 * sum(said == "yes" for said in said_b) / len(asked) if yes_no else None,
        # Models that differ on fewer questions than a point would differ on a point's worth at least.
        questions_for_a_point=questions_needed(
            POINT, max(POINT, paired.discordance), design_effect=effect
        ),
    )


def _f1_difference(
    said_a: Sequence[str],
    said_b: Sequence[str],
    labels: Sequence[str],
    images: Sequence[str],
    level: float,
    seed: int,
) -> Estimate:
    positive = np.asarray(labels) == "yes"
    columns = []
    for said in (said_a, said_b):
        yes = np.asarray(said) == "yes"
        columns += [yes & positive, yes ^ positive]

    def difference(sums: np.ndarray) -> np.ndarray:
        hit_a, miss_a, hit_b, miss_b = np.moveaxis(sums, -1, 0)
        return f1_percent(hit_b, miss_b) - f1_percent(hit_a, miss_a)

    return bootstrap_estimate(
        np.stack(columns, axis=1).astype(float), images, difference, level=level, seed=seed
    )


def plain(rows: Sequence[Comparison]) -> list[dict[str, Any]]:
    """As data that JSON can hold, with the discordance [%]."""
    return [
        without_nan(dataclasses.asdict(row) | {"discordance": row.paired.discordance})
        for row in rows
    ]


def counts_sentence(rows: Sequence[Comparison]) -> str:
    """Why the questions of a yes/no data set have two numbers, here and in what `vlmeval` prints; empty where they do not."""
    told = []
    for data in dict.fromkeys(row.data for row in rows):
        sizes = {
            row.split: row.paired.n for row in rows if row.data == data and row.yes_a is not None
        }
        if (once := sizes.pop("all", 0)) < (asked := sum(sizes.values())):
            told.append(split_counts(data, once, asked))
    return " ".join(told)


def split_counts(data: str, questions: int, rows: int) -> str:
    """The two numbers of a data set in one sentence: distinct questions, and questions of all splits together."""
    return (
        f"{shown(data)} has {questions:,} distinct questions, each counted once where models are compared; VLMEvalKit and the "
        f"authors count one again in every split that asks it, {rows:,} in all."
    )


def comparison_table(rows: Sequence[Comparison], level: float = 0.95) -> Any:
    """For rich to print: one line per data set, rule and split; where the terminal is too narrow for it, two short tables of
    each data set and rule."""
    return ComparisonTable(rows, level, counts_sentence(rows))
