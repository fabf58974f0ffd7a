"""Yes/no benchmarks by the names that VLMEvalKit gives them: how an answer is read, what is scored
together, and which numbers are shown.

A yes/no table of another name is read and scored as POPE.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from hipp_ext.evals import amber, hallusionbench, mme
from hipp_ext.evals.pope import RULES, vlmeval_answer

Scores = dict[str, dict[str, float]]


class Asked(Protocol):
    """The fields of a question that scoring reads; `runs.AskedQuestion` has them."""

    @property
    def index(self) -> str: ...

    @property
    def answer(self) -> str: ...

    @property
    def category(self) -> str: ...

    @property
    def image(self) -> str: ...

    @property
    def group(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One yes/no benchmark.

    Attributes:
        name: name of the data set.
        rules: how an answer is read as "yes", "no" or "unknown", by name; VLMEvalKit's is first.
        positive: the answer that precision, recall and F1 are about; None: it has no F1.
        ending: what VLMEvalKit adds to a question.
        whole: name of the share of pictures with all answers correct; None: it is not reported.
        group_size: number of questions in a complete group; None: any.
        score: scores by split of the answers that a rule has read, in percent; None for POPE, which
            `pope_scores` scores.
        cluster: key of the questions that are not independent of a question.
        shown: splits with their (label, field) of the numbers in the table of `vlmeval`.
        columns: (title, split, field) of the numbers in a report, after the name of the data set.
    """

    name: str
    rules: Mapping[str, Callable[[str], str]]
    positive: str | None = None
    ending: str = ""
    whole: str | None = None
    group_size: int | None = None
    score: Callable[[Sequence[str], Sequence[Asked], bool], Scores] | None = None
    cluster: Callable[[Asked], str] = lambda question: question.image
    shown: tuple[tuple[tuple[str, ...], tuple[tuple[str, str], ...]], ...] = ()
    columns: tuple[tuple[str, str, str], ...] = ()


def _mme(predictions: Sequence[str], questions: Sequence[Asked], errors: bool) -> Scores:
    rows = mme.paired_rows([q.group for q in questions])
    own = [questions[row] for row in rows]
    return mme.mme_scores(
        [predictions[row] for row in rows],
        [q.answer for q in own],
        [q.category.split(",")[-1] for q in own],
        [q.group for q in own],
        [q.image for q in own],
        errors=errors,
    )


def _amber(predictions: Sequence[str], questions: Sequence[Asked], errors: bool) -> Scores:
    splits = [q.category.split(",") for q in questions]
    labels, images = [q.answer for q in questions], [q.image for q in questions]
    return amber.amber_scores(predictions, labels, splits, images, errors=errors)


def _hallusionbench(predictions: Sequence[str], questions: Sequence[Asked], errors: bool) -> Scores:
    splits = [q.category.split(",") for q in questions]
    labels, indices = [q.answer for q in questions], [q.index for q in questions]
    return hallusionbench.hallusionbench_scores(predictions, labels, splits, indices, errors=errors)


_KINDS = ("overall", "existence", "attribute", "relation")
_OF_NO = (("accuracy", "accuracy"), ("precision of no", "precision"), ("recall of no", "recall"))
_OF_NO += (("F1 of no", "f1"),)
_ACCURACIES = (("aAcc", "accuracy"), ("fAcc", "figure_accuracy"), ("qAcc", "pair_accuracy"))

POPE = Benchmark(
    name="POPE",
    rules=RULES,
    positive="yes",
    columns=(("", "overall", "accuracy"), ("F1", "overall", "f1")),
)
MME = Benchmark(
    name=mme.NAME,
    rules={"vlmeval": vlmeval_answer, "official": mme.official_answer},
    whole="accuracy+",
    group_size=mme.PER_PICTURE,
    score=_mme,
    shown=(
        (tuple(mme.TOTALS), (("score", "score"),)),
        (mme.SUBTASKS, (("accuracy", "accuracy"), ("accuracy+", "accuracy_plus"))),
    ),
    columns=(("perception", "perception", "score"), ("cognition", "cognition", "score")),
)
AMBER = Benchmark(
    name=amber.NAME,
    rules={"vlmeval": vlmeval_answer, "official": amber.official_answer},
    positive="no",
    ending=amber.ENDING,
    score=_amber,
    shown=((_KINDS, _OF_NO),),
    columns=(("", "overall", "accuracy"), ("F1 of no", "overall", "f1")),
)
HALLUSIONBENCH = Benchmark(
    name=hallusionbench.NAME,
    rules={"vlmeval": vlmeval_answer},
    whole="fAcc",
    score=_hallusionbench,
    cluster=lambda question: question.group.rpartition("_")[0],  # the set of the figure
    shown=((("overall", "VD", "VS"), _ACCURACIES),),
    columns=tuple((label, "overall", field) for label, field in _ACCURACIES),
)
BENCHMARKS = {one.name: one for one in (MME, AMBER, HALLUSIONBENCH)}
POPE_LIKE = ("POPE", "RePOPE")


def benchmark_of(name: str) -> Benchmark:
    """The benchmark of this name; POPE for any other yes/no data set."""
    return BENCHMARKS.get(name, POPE)


def benchmark_scores(
    name: str, answers: Sequence[str], questions: Sequence[Asked]
) -> dict[str, Scores]:
    """Scores by rule and split of one of `BENCHMARKS`, with standard errors."""
    benchmark = BENCHMARKS[name]
    assert benchmark.score is not None
    return {
        rule: benchmark.score([read(answer) for answer in answers], questions, True)
        for rule, read in benchmark.rules.items()
    }


def scored_rows(name: str, groups: Sequence[str]) -> list[int]:
    """The rows whose questions are scored: for MME those about a picture with both questions."""
    whole = benchmark_of(name).group_size is not None
    return mme.paired_rows(groups) if whole else list(range(len(groups)))
