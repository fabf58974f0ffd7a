"""Rows of the study -> a table, the comparison with the best of the others, and a picture."""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hipp_ext.evals.measuring import describe
from hipp_ext.evals.studies.measuring import RESULTS, command_line, keep_picture, mean_and_se
from hipp_ext.evals.studies.real_lm.jobs import SIDES
from hipp_ext.evals.studies.real_lm.methods import HIPP, METHODS
from hipp_ext.evals.studies.real_lm.picture import picture
from hipp_ext.evals.studies.real_lm.study import Study
from hipp_ext.evals.studies.real_lm.table import print_table, section
from hipp_ext.evals.studies.real_lm.text import perplexity
from hipp_ext.files import write_atomic

NAME = "real_lm"
Rows = Sequence[Mapping[str, Any]]
Summary = dict[str, Any]


def run(study: Study, name: str = NAME, *, save: bool = False, show: bool = True) -> Summary:
    """Run what the study's folder lacks; result, picture and section are up to date after each job.

    Args:
        study: what to run.
        name: name of the files in the study's folder: JSON, PNG, and a section for RESULTS.md.
        save: write the first two to evals/studies/results too.
        show: show a progress bar.
    """
    result: Summary = {}
    for rows in study.run(show=show):
        values = {"identity": study.identity, **summarize(rows)}
        result = describe(command_line(), values, "cpu")
        for folder in [study.folder, *([RESULTS] if save else [])]:
            write_atomic(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
        keep_picture(name, picture(result), save=save, folder=study.folder)
        write_atomic(study.folder / f"{name}.md", section(result, name, study.draws))
    print_table(result)
    return result


def summarize(rows: Rows) -> Summary:
    """Perplexity by method, side and ratio: mean and standard error over draws, and its cost.

    Args:
        rows: of `Study.run`, the dense model's first.
    """
    dense, *pruned = rows
    methods: Summary = {}
    for name in METHODS:
        own = [row for row in pruned if row["method"] == name]
        if not own:
            continue
        methods[name] = {
            "seconds": mean_and_se(_once(own, "seconds")),
            "passes": mean_and_se(_once(own, "passes")),
            **{side: _cells([r for r in own if r["side"] == side]) for side in SIDES},
        }
    return {
        "dense": perplexity(dense["losses"]),
        "methods": methods,
        "hipp over the best other": _claims(pruned, methods),
    }


def _once(rows: Rows, what: str) -> list[float]:
    """A cost of the plans, once per draw that plans were made from."""
    by_draw = {
        row["draw"] if METHODS[row["method"]].calibrated else 0: float(row[what]) for row in rows
    }
    return list(by_draw.values())


def _cells(rows: Rows) -> Summary:
    """Ratio -> removed fraction and perplexity."""
    cells: Summary = {}
    for ratio in sorted({row["ratio"] for row in rows}):
        own = [row for row in rows if row["ratio"] == ratio]
        values = [perplexity(row["losses"]) for row in own]
        removed = statistics.fmean(row["removed"] for row in own)
        cells[str(ratio)] = {**mean_and_se(values), "values": values, "removed": removed}
    return cells


def _claims(rows: Rows, methods: Summary) -> Summary:
    """Ratio and side -> log of hipp's perplexity over that of the best other method [nats].

    The standard error is that of the test rows, paired, after the mean over draws.
    """
    claims: Summary = {}
    for side in SIDES:
        for ratio in methods.get(HIPP, {}).get(side, {}):
            others = {
                name: found[side][ratio]["mean"]
                for name, found in methods.items()
                if not name.startswith("hipp") and ratio in found[side]
            }
            if not others:
                continue
            best = min(others, key=others.__getitem__)
            one, other = (_mean_losses(rows, name, float(ratio), side) for name in (HIPP, best))
            gains = [a - b for a, b in zip(one, other, strict=True)]
            claims[f"{side} {ratio}"] = {"over": best, **mean_and_se(gains)}
    return claims


def _mean_losses(rows: Rows, method: str, ratio: float, side: str) -> list[float]:
    """Loss of each test row, mean over draws."""
    own = [
        row["losses"]
        for row in rows
        if (row["method"], row["ratio"], row["side"]) == (method, ratio, side)
    ]
    return [statistics.fmean(losses) for losses in zip(*own, strict=True)]
