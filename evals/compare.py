"""Compares the answers of two models to the same questions: accuracies, their difference and its
error bar.

POPE asks several questions about one image, so its bootstrap draws images; for multiple choice it
draws questions.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hipp_ext.errors import DataError
from hipp_ext.evals.benchmarks import POPE, Benchmark, benchmark_of
from hipp_ext.evals.compare_table import fitting_table
from hipp_ext.evals.runs import AskedQuestion, Run, read_runs
from hipp_ext.evals.statistics import (
    Estimate,
    PairedDifference,
    bootstrap_estimate,
    f1_percent,
    paired_difference,
    questions_needed,
    ratio,
    whole_groups,
    without_nan,
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

MAX_SPLITS, MAX_OPTIONS = 101, 26  # each split needs a bootstrap; options have letters
POINT = 1.0  # difference [percentage points] for which the needed number of questions is given


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The comparison on one split of one data set, by one rule for reading answers.

    Attributes:
        data: name of the data set.
        rule: "vlmeval" or "official" (yes/no; see `evals.benchmarks`), or "letter" (multiple
            choice).
        split: "all" (every question once) or one of the data set's splits.
        paired: the accuracies and their difference, B - A.
        f1: difference of the F1 of yes, for AMBER of no [percentage points], B - A; None for
            multiple choice, MME and HallusionBench.
        whole: difference of the share of pictures whose questions are all answered correctly
            [percentage points], B - A: MME's accuracy+ and HallusionBench's fAcc; else None.
        yes_a, yes_b: share of the answers yes [%]; None for multiple choice.
        questions_for_a_point: number of questions needed to show a difference of one point (power
            80%, level 5%), for the discordance and the design effect measured here.
        benchmark: name of the benchmark whose rules these are; empty for multiple choice.
    """

    data: str
    rule: str
    split: str
    paired: PairedDifference
    f1: Estimate | None
    whole: Estimate | None
    yes_a: float | None
    yes_b: float | None
    questions_for_a_point: int
    benchmark: str

    def __str__(self) -> str:
        own = self.paired.difference
        asked = self.data if self.yes_a is None else f"{self.data} ({self.split})"
        return (
            f"{asked}: B - A {own.value:+.1f} points ({own.low:+.1f} to {own.high:+.1f}), "
            f"p {own.p_value:.2g}; {self.paired.n:,} questions, and "
            f"{self.questions_for_a_point:,} would show one point"
        )


def compare(
    a: str | Path,
    b: str | Path,
    *,
    tsv: str | Path | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> list[Comparison]:
    """The comparisons of two models on every data set for which `vlmeval` evaluated both.

    Args:
        a, b: files or folders of the results; see `runs.read_runs`.
        tsv: the questions, for predictions without questions.jsonl.
        level: confidence level of the intervals.
        seed: random seed of the bootstrap.

    Raises:
        DataError: the models have no data set in common, or their questions differ; the message
            says where.
    """
    runs_a, runs_b = read_runs(a, tsv), read_runs(b, tsv)
    # The names of single files do not matter: the questions show whether they belong together.
    if len(runs_a) == len(runs_b) == 1:
        pairs = [(*runs_a.values(), *runs_b.values())]
    else:
        pairs = [(run, runs_b[name]) for name, run in runs_a.items() if name in runs_b]
    if not pairs:
        raise DataError(
            f"no data set in common: A has {shown(', '.join(runs_a))}, B has "
            f"{shown(', '.join(runs_b))}"
        )
    return [row for pair in pairs for row in compare_runs(*pair, level=level, seed=seed)]


def compare_runs(a: Run, b: Run, *, level: float = 0.95, seed: int = 0) -> list[Comparison]:
    """The comparisons by each rule and, for yes/no, on each split, after that on all questions.

    Raises:
        DataError: the questions differ, or there are more splits or options than a benchmark has.
    """
    check_same_questions(a, b)
    asked, rows = a.questions, []
    yes_no = asked[0].kind == YES_NO
    benchmark = benchmark_of(asked[0].benchmark) if yes_no else None
    if len({question.benchmark for question in asked}) > 1:
        raise DataError(f"{shown(a.data)}: its questions are those of several benchmarks")
    splits = {"all": list(range(len(asked)))}
    for row, question in enumerate(asked):
        for split in dict.fromkeys(question.category.split(",")) if yes_no else ():
            splits.setdefault(split, []).append(row)
    if len(splits) > MAX_SPLITS or any(
        len(question.options or ()) > MAX_OPTIONS for question in asked
    ):
        raise DataError(
            f"{shown(a.data)}: {len(splits) - 1:,} splits, of {MAX_SPLITS - 1} that can be "
            f"compared, or a question with more than {MAX_OPTIONS} options"
        )
    for rule in benchmark.rules if benchmark else ("letter",):
        predictions = np.asarray(
            [
                [q.prediction(text, rule) for q, text in zip(asked, run.answers, strict=True)]
                for run in (a, b)
            ]
        )
        for split, own in splits.items():
            questions = [asked[row] for row in own]
            numbers = _compare_split(questions, predictions[:, own], benchmark, level, seed)
            rows.append(Comparison(data=a.data, rule=rule, split=split, **numbers))
    return rows


def check_same_questions(a: Run, b: Run) -> None:
    """Raise DataError, which names the first difference, unless both runs answer the same
    questions.
    """
    if a.questions == b.questions:
        return
    names = [f"{shown(run.model)} on {shown(run.data)}" for run in (a, b)]
    where = f"A ({names[0]}) and B ({names[1]}) cannot be compared"
    by_index = {question.index: question for question in b.questions}
    if len(a.questions) != len(b.questions):
        raise DataError(
            f"{where}: A answers {len(a.questions)} questions and B {len(b.questions)}. Ask both "
            "the same"
        )
    for question in a.questions:
        other = by_index.get(question.index)
        if other is None:
            raise DataError(f"{where}: A answers index {shown(question.index)}, B does not")
        for field in ("question", "options", "image", "answer", "category", "benchmark", "group"):
            own, theirs = getattr(question, field), getattr(other, field)
            if own != theirs:
                cells = [shown(repr(value), 200) for value in (own, theirs)]
                raise DataError(
                    f"{where}: the {field} of index {shown(question.index)} is {cells[0]} in A "
                    f"and {cells[1]} in B. They were asked different data"
                )
    raise DataError(f"{where}: the questions are in another order. They were asked different data")


def _compare_split(
    questions: Sequence[AskedQuestion],
    predictions: np.ndarray,
    benchmark: Benchmark | None,
    level: float,
    seed: int,
) -> dict[str, Any]:
    """The fields of the comparison on some questions; `predictions` are those of A and of B.

    Args:
        benchmark: the benchmark of yes/no questions; None for multiple choice.
    """
    labels = np.asarray([question.label for question in questions])
    clusters = [question.cluster for question in questions]
    correct_a, correct_b = predictions == labels
    paired = paired_difference(correct_a, correct_b, clusters, level=level, seed=seed)
    effect = 1.0 if math.isnan(paired.design_effect) else max(1.0, paired.design_effect)
    yes = predictions == "yes"
    yes_a, yes_b = map(float, 100 * yes.mean(axis=1)) if benchmark else (None, None)
    f1 = whole = None
    if benchmark and (positive := benchmark.positive):
        f1 = _f1_difference(predictions == positive, labels == positive, clusters, level, seed)
    if benchmark and benchmark.whole:
        groups = [question.group for question in questions]
        whole_a, whole_b = (
            whole_groups(own, groups, benchmark.group_size) for own in (correct_a, correct_b)
        )
        whole = _whole_difference(whole_a, whole_b, clusters, level, seed)
    return {
        "paired": paired,
        "f1": f1,
        "whole": whole,
        "yes_a": yes_a,
        "yes_b": yes_b,
        # If the models differ on fewer questions than one point, one point is assumed.
        "questions_for_a_point": questions_needed(
            POINT, max(POINT, paired.discordance), design_effect=effect
        ),
        "benchmark": benchmark.name if benchmark else "",
    }


def _whole_difference(
    a: np.ndarray, b: np.ndarray, clusters: Sequence[str], level: float, seed: int
) -> Estimate:
    """The difference of the shares of groups that are wholly correct; see `whole_groups`."""
    counts = np.stack([a[:, 0], b[:, 1] - a[:, 1]], axis=1)
    return bootstrap_estimate(
        counts, clusters, lambda s: 100 * ratio(s[..., 1], s[..., 0]), level=level, seed=seed
    )


def _f1_difference(
    said: np.ndarray, positive: np.ndarray, clusters: Sequence[str], level: float, seed: int
) -> Estimate:
    """The difference of the F1 of the positive answer, which `said` tells of A and of B."""

    def difference(sums: np.ndarray) -> np.ndarray:
        hit_a, miss_a, hit_b, miss_b = np.moveaxis(sums, -1, 0)
        return f1_percent(hit_b, miss_b) - f1_percent(hit_a, miss_a)

    columns = [column for own in said for column in (own & positive, own ^ positive)]
    counts = np.stack(columns, axis=1).astype(float)
    return bootstrap_estimate(counts, clusters, difference, level=level, seed=seed)


def plain(rows: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The comparisons as data for JSON, with the discordance [%]."""
    return [
        without_nan(dataclasses.asdict(row) | {"discordance": row.paired.discordance})
        for row in rows
    ]


def counts_sentence(rows: Sequence[Comparison]) -> str:
    """Explains why `vlmeval` prints another number of questions for a data set with POPE's splits;
    empty if it does not.
    """
    sentences = []
    for data in dict.fromkeys(row.data for row in rows):
        sizes = {
            row.split: row.paired.n
            for row in rows
            if row.data == data and row.benchmark == POPE.name
        }
        if (once := sizes.pop("all", 0)) < (asked := sum(sizes.values())):
            sentences.append(split_counts(data, once, asked))
    return " ".join(sentences)


def split_counts(data: str, questions: int, rows: int) -> str:
    """One sentence on a data set's number of distinct questions and the sum over its splits."""
    return (
        f"{shown(data)} has {questions:,} distinct questions, each counted once where models are "
        "compared; VLMEvalKit and the authors count one again in every split that asks it, "
        f"{rows:,} in all."
    )


def comparison_table(rows: Sequence[Comparison], level: float = 0.95) -> Any:
    """A table for rich: one line per data set, rule and split, or short tables if the terminal is
    narrow.
    """
    from rich.console import Group
    from rich.text import Text

    note = counts_sentence(rows)
    return Group(fitting_table(rows, level), *([Text(note)] if note else []))
