"""AMBER, HallusionBench and MME for lm-eval: the functions that the task files name.

The TSVs, prompts and rules are those of `vlmeval`. Rates are fractions, [0, 1], as everywhere in
lm-eval; MME's scores are sums of fractions.

A metric is named RULE_NUMBER, and the function that computes it BENCHMARK_RULE_NUMBER, such as
mme_vlmeval_perception; `NUMBERS` lists them.
"""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from hipp_ext.evals.amber import NAME as AMBER
from hipp_ext.evals.benchmarks import BENCHMARKS, scored_rows
from hipp_ext.evals.hallusionbench import NAME as HALLUSIONBENCH
from hipp_ext.evals.mme import NAME as MME
from hipp_ext.evals.mme import SUBTASKS, TOTALS

_RATES = {name: ("overall", name) for name in ("yes_rate", "unknown_rate")}
_ACCS = {"aAcc": "accuracy", "fAcc": "figure_accuracy", "qAcc": "pair_accuracy"}


def _with_errors(numbers: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    return numbers | {f"{name}_se": (split, f"{own}_se") for name, (split, own) in numbers.items()}


# Benchmark -> name of a number -> its split and field.
NUMBERS: dict[str, dict[str, tuple[str, str]]] = {
    MME: _with_errors(
        {total: (total, "score") for total in TOTALS}
        | {name: ("overall", name) for name in ("accuracy", "accuracy_plus")}
    )
    | _RATES
    | {f"score_{subtask}": (subtask, "score") for subtask in SUBTASKS},
    AMBER: {
        f"{field}_{split}": (split, field)
        for split in ("overall", "existence", "attribute", "relation")
        for field in ("accuracy", "precision", "recall", "f1")
    }
    | {f"{field}_se": ("overall", f"{field}_se") for field in ("accuracy", "f1")}
    | _RATES,
    HALLUSIONBENCH: _with_errors({name: ("overall", own) for name, own in _ACCS.items()})
    | {f"{name}_{part}": (part, own) for part in ("VD", "VS") for name, own in _ACCS.items()}
    | _RATES,
}


def results(doc: dict, answers: Sequence[str]) -> dict[str, Any]:
    """What the question adds to each metric: its fields, and the answer as the rule reads it."""
    benchmark = BENCHMARKS[doc["data"]]
    fields = {name: doc[name] for name in ("index", "answer", "category", "image", "group")}
    found = {}
    for rule, read in benchmark.rules.items():
        item = {**fields, "prediction": read(answers[0])}
        found |= {f"{rule}_{number}": item for number in NUMBERS[benchmark.name]}
    return found


def __getattr__(name: str) -> Callable[[Sequence[Any]], float]:
    """The aggregation of a metric, such as mme_vlmeval_perception."""
    key, _, metric = name.partition("_")
    rule, _, number = metric.partition("_")
    for benchmark in BENCHMARKS.values():
        known = rule in benchmark.rules and number in NUMBERS[benchmark.name]
        if known and benchmark.name.lower() == key:
            return _aggregation(benchmark.name, number)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _aggregation(benchmark: str, number: str) -> Callable[[Sequence[Any]], float]:
    split, field = NUMBERS[benchmark][number]
    score = BENCHMARKS[benchmark].score
    assert score is not None

    def aggregate(items: Sequence[Any]) -> float:
        questions: list[Any] = [SimpleNamespace(**item) for item in items]
        if not scored_rows(benchmark, [question.group for question in questions]):
            return math.nan  # a limit has left no picture with both of its questions
        said = [question.prediction for question in questions]
        found = score(said, questions, field.endswith("_se"))
        return found[split][field] / 100 if split in found else math.nan

    aggregate.__name__ = number
    return aggregate
