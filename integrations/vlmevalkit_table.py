"""The output of `vlmeval`: one table if it fits, else one for each model and data set."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hipp_ext.evals.text_table import FittingTable
from hipp_ext.files.untrusted import shown

if TYPE_CHECKING:
    from rich.console import Console

    from hipp_ext.integrations.vlmevalkit_run import EvalRecord

_TITLE = "all numbers in percent, ± standard error"
_TOTALS = (
    "MME's score is the sum of accuracy and accuracy+ over its subtasks: at most 2000 and 800."
)
_NUMBERS = ("n", "VLMEvalKit's\nrule", "authors'\nrule", "yes", "unknown")


def print_records(records: Sequence["EvalRecord"], console: "Console | None" = None) -> None:
    """Print the numbers of the records, what n counts, and the files of the answers.

    Args:
        records: records of one command.
        console: console for the output. Default: standard output, with any width if it is not a
            terminal.
    """
    from rich.box import HEAVY_HEAD
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    names = _names(records)
    rows = [
        [name, record.data, *row]
        for record, name in zip(records, names, strict=True)
        for row in _rows(record)
    ]
    table = FittingTable(
        _TITLE, ("model", "data", "metric"), [_NUMBERS], rows, "{} on {}", box=HEAVY_HEAD
    )
    if rows:  # there are none where questions were only asked
        (console if console.is_terminal else Console(file=console.file, width=10_000)).print(table)
    for line in _counts(records):
        console.print(Text(line))
    for record, name in zip(records, names, strict=True):
        line = shown(f"{name} on {record.data}: answers in {record.predictions}")
        console.print(Text(line), soft_wrap=True)


def _names(records: Sequence["EvalRecord"]) -> list[str]:
    """Names of the models, as they were typed; equal names get the first digits of their hash."""
    hashes: dict[str, set[str]] = {}
    for record in records:
        hashes.setdefault(record.model, set()).add(record.model_hash)
    return [
        r.model if len(hashes[r.model]) == 1 else f"{r.model}-{r.model_hash[:8]}" for r in records
    ]


def _counts(records: Sequence["EvalRecord"]) -> list[str]:
    """Explains, once per data set, why POPE's n is larger than the number of questions asked."""
    lines = {}
    for record in records:
        counted = (
            record.metrics["official"]["overall"]["n"] if "official" in record.metrics else record.n
        )
        if counted != record.n:
            lines[record.data, record.n] = (
                f"{record.data}: {record.n} questions were asked; n is {counted} because, as in "
                "VLMEvalKit, a question counts once for each split that it belongs to. (`hipp "
                "compare` counts each question once.)"
            )
    return [*lines.values(), *([_TOTALS] if any(r.data == "MME" for r in records) else [])]


def _rows(record: "EvalRecord") -> list[list[str]]:
    """Metric and numbers of each line of a record."""
    metrics = record.metrics
    if not metrics:
        return []
    if "scores" in metrics:
        return _benchmark_rows(record.data, metrics["scores"])
    if "official" not in metrics:
        return [
            [
                f"accuracy {group}",
                str(own["n"]),
                _number(own, "accuracy"),
                "",
                "",
                f"{own['unknown_rate']:.1f}",
            ]
            for group, own in metrics["accuracy"].items()
        ]
    return [
        [
            f"{label} {split}",
            str(ours["n"]),
            _number(ours, metric),
            _number(metrics["official"][split], metric),
            f"{metrics['official'][split]['yes_rate']:.1f}",
            f"{ours['unknown_rate']:.1f}",
        ]
        for split, ours in metrics["vlmeval"].items()
        for metric, label in (("f1", "F1"), ("accuracy", "accuracy"))
    ]


def _benchmark_rows(name: str, scores: dict) -> list[list[str]]:
    """Metric and numbers of each line of one of `BENCHMARKS`; the authors' column is empty where
    they let a judge read the answers.
    """
    from hipp_ext.evals.benchmarks import BENCHMARKS

    ours, official = scores["vlmeval"], scores.get("official", {})
    return [
        [
            f"{label} {split}",
            str(ours[split]["n"]),
            _number(ours[split], field),
            _number(official[split], field) if official else "",
            f"{ours[split]['yes_rate']:.1f}",
            f"{ours[split]['unknown_rate']:.1f}",
        ]
        for splits, numbers in BENCHMARKS[name].shown
        for split in splits
        if split in ours
        for label, field in numbers
    ]


def _number(scores: dict, metric: str) -> str:
    error = scores[f"{metric}_se"]
    return f"{scores[metric]:.2f}" + ("" if error is None else f" ± {error:.2f}")
