"""The results table of a report: models with their sizes and scores, as texts."""

from collections.abc import Mapping, Sequence
from typing import Any

from hipp_ext.evals.benchmarks import BENCHMARKS, POPE_LIKE, benchmark_of
from hipp_ext.evals.pope import SPLITS
from hipp_ext.evals.report.entries import Entry, main_yes_no
from hipp_ext.evals.text_table import parameters_text

UNKNOWN = "not known"


def table_rows(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the results table: sizes, and scores with standard errors; scores that
    were not measured are empty.

    There is one column per data set, or one for each of its main numbers. The main yes/no one
    (POPE, if it is there) also has columns for its splits, F1 and yes-rate.
    """
    main = main_yes_no(entries)
    others = _columns(entries, main)
    header = ["model", "removed", "size", *(title for title, *_ in others)]
    header += [main, "rnd", "pop", "adv", "F1", "yes"] if main else []
    rows = []
    for e in entries:
        size = parameters_text(e.parameters) if e.parameters else UNKNOWN
        row = [e.name, _removed(e, is_dense=e is entries[0]), size]
        row += [_with_error(_split(e, data, split), field) for _, data, split, field in others]
        if main:
            splits = e.records[main]["metrics"]["vlmeval"] if main in e.records else {}
            overall = splits.get("overall", {})
            row += [
                _with_error(overall, "accuracy"),
                *(_number(splits.get(s, {}), "accuracy") for s in SPLITS),
                _number(overall, "f1"),
                _number(overall, "yes_rate"),
            ]
        rows.append(row)
    return header, rows


def _removed(entry: Entry, is_dense: bool) -> str:
    """Share of the prunable parameters that the plan removes."""
    if entry.plan:
        return f"{100 * entry.plan.pruning_ratio:.1f}%"
    return "nothing" if is_dense else UNKNOWN


def _columns(entries: Sequence[Entry], main: str | None) -> list[tuple[str, str, str, str]]:
    """(title, data set, split, field) of every column of the data sets beside the main one."""
    found: dict[tuple[str, str, str, str], None] = {}
    for data, record in ((d, r) for e in entries for d, r in e.records.items() if d != main):
        known = data in (*POPE_LIKE, *BENCHMARKS) and "accuracy" not in record["metrics"]
        columns = benchmark_of(data).columns if known else ()
        for title, split, field in columns or (("", "overall", "accuracy"),):
            found[f"{data.removesuffix('_TEST')} {title}".strip(), data, split, field] = None
    return list(found)


def _split(entry: Entry, data: str, split: str) -> Mapping[str, Any]:
    """The scores of one split, by VLMEvalKit's rule; empty if there are none."""
    metrics = entry.records.get(data, {}).get("metrics", {})
    scores = metrics.get("scores") or {}
    rule = scores.get("vlmeval") or metrics.get("vlmeval") or metrics.get("accuracy") or {}
    return rule.get(split, {})


def _number(scores: Mapping[str, Any], metric: str) -> str:
    return f"{scores[metric]:.1f}" if scores.get(metric) is not None else ""


def _with_error(scores: Mapping[str, Any], metric: str) -> str:
    error = scores.get(f"{metric}_se")
    return _number(scores, metric) + (f" ± {error:.1f}" if error is not None else "")
