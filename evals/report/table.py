"""The results table of a report: models with their sizes and scores, as texts."""

from collections.abc import Mapping, Sequence
from typing import Any

from hipp_ext.evals.pope import SPLITS
from hipp_ext.evals.report.entries import Entry, main_yes_no
from hipp_ext.evals.text_table import parameters_text

UNKNOWN = "not known"


def table_rows(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the results table: sizes, and scores with standard errors; scores that
    were not measured are empty.

    There is one column per data set. The main yes/no one (POPE, if it is there) also has columns
    for its splits, F1 and yes-rate.
    """
    main = main_yes_no(entries)
    others = dict.fromkeys(d for e in entries for d in e.records if d != main)
    header = ["model", "removed", "size", *(name.removesuffix("_TEST") for name in others)]
    header += [main, "rnd", "pop", "adv", "F1", "yes"] if main else []
    rows = []
    for e in entries:
        size = parameters_text(e.parameters) if e.parameters else UNKNOWN
        row = [e.name, _removed(e, is_dense=e is entries[0]), size]
        row += [_with_error(_overall(e, data), "accuracy") for data in others]
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


def _overall(entry: Entry, data: str) -> Mapping[str, Any]:
    metrics = entry.records.get(data, {}).get("metrics", {})
    return (metrics.get("vlmeval") or metrics.get("accuracy") or {}).get("overall", {})


def _number(scores: Mapping[str, Any], metric: str) -> str:
    return f"{scores[metric]:.1f}" if metric in scores else ""


def _with_error(scores: Mapping[str, Any], metric: str) -> str:
    error = scores.get(f"{metric}_se")
    return _number(scores, metric) + (f" ± {error:.1f}" if error is not None else "")
