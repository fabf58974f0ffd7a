"""The result as a section for RESULTS.md."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from hipp_ext.evals.studies.recovery.language import KL, LOSS, OTHER
from hipp_ext.evals.studies.recovery.summary import targets

PERPLEXITIES = {LOSS: "perplexity", OTHER: "perplexity, other text"}
COMPARED = (LOSS, OTHER, KL, "POPE", "ScienceQA")
SECTION = """## Recovery

`{command}`

{device}, {threads} threads. Arms of a model take equally many steps over the same rows in the same
order. The learning rates of distillation and cross-entropy are those that a search on validation
data found; "no reconstruction" takes that of distillation. Each figure is the mean over seeds; its
standard error is that over the items of the test (clustered by picture), and over seeds where there
are some. "Distillation" starts from a reconstructed model and trains all parameters, and every
other arm differs from it in one thing; differences are taken item by item.

{targets}

{tables}

![Recovery](results/recovery.png)
"""


def section(result: Mapping[str, Any]) -> str:
    """The section.

    Args:
        result: what `__main__.run` writes.
    """
    tasks = result["tasks"]
    return SECTION.format(
        command=result["command"],
        device=result["device"],
        threads=result["threads"],
        targets="\n".join(f"- {line}." for line in targets(tasks)) or "No target is measured yet.",
        tables="\n\n".join(_table(name, found) for name, found in tasks.items()),
    )


def _table(name: str, found: Mapping[str, Any]) -> str:
    measures = list(found["dense"])
    head = ["", *(title_of(m) for m in measures), "distillation minus it", "seeds", "lr", "minutes"]
    rows = [head, ["---"] * len(head), _row("dense", found["dense"], measures)]
    for ratio, own in found["ratios"].items():
        rows += [_row(f"{ratio} {n}", row, measures) for n, row in own["before"].items()]
        for arm, row in own["arms"].items():
            gains = own["distillation minus it"].get(arm, {})
            gain = ", ".join(_gain(m, gains[m]) for m in COMPARED if m in gains)
            cells = _row(f"{ratio} {arm}", row, measures)[: 1 + len(measures)]
            facts = [str(row[measures[0]]["seeds"]), f"{row['lr']:g}", f"{row['minutes']:.1f}"]
            rows.append([*cells, gain, *facts])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    counts = ", ".join(f"{title_of(m)}: n = {found['dense'][m]['n']}" for m in measures)
    notes = [f"{name}. {found['what']} {counts}."]
    for ratio, own in found["ratios"].items():
        for arm, row in own["arms"].items():
            if "bytes" in row:
                times = row["fp32_bytes"] / row["bytes"]
                notes.append(f"{arm} at {ratio} sent {times:.0f} times fewer bytes than float32.")
    return f"{' '.join(notes)}\n\n{table}"


def _row(name: str, row: Mapping[str, Any], measures: list[str]) -> list[str]:
    return [name, *(shown(m, row[m]) for m in measures), "", "", "", ""]


def title_of(measure: str) -> str:
    return PERPLEXITIES.get(measure, measure)


def _gain(measure: str, gain: Mapping[str, Any] | None) -> str:
    if gain is None:
        return ""
    unit = "nats" if measure == LOSS else measure
    return f"{gain['mean']:+.3g} ± {gain['se']:.2g} {unit}"


def shown(measure: str, figure: Mapping[str, Any]) -> str:
    """A figure with its standard error; of a loss the perplexity."""
    mean, error = in_units(measure)(figure["mean"]), figure["se"]
    if measure == KL:
        return f"{mean:.3f} ± {error:.3f}"
    if measure in PERPLEXITIES:
        return f"{mean:.2f} ± {mean * error:.2f}"
    return f"{mean:.1f} ± {error:.1f}"


def in_units(measure: str) -> Callable[[float], float]:
    """From a mean of items to what is shown: perplexity for a loss."""
    return math.exp if measure in PERPLEXITIES else float
