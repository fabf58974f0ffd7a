"""The table as a section for RESULTS.md, made from its JSON."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Entry = Mapping[str, Any]
TITLES = {
    "none": "Nothing done after pruning",
    "reconstruct": "Reconstructed by least squares",
    "distil": "After equal recovery",
}
SECTION = """## A model that sees: the table

`{command}`

{device}, {threads} threads, {dtype}, {precision}.
{pope} POPE questions and {captions} captions on {captions} pictures, and {choice} multiple-choice
questions, the first of the test split. Rows are all that the folder of the command has, also of
earlier commands. Percent ± standard error over pictures; differences are paired by question. Rows
with several seeds show their mean. CHAIR_i is the fraction of named things that are not in the
picture. "Random", "popular" and "adversarial" are F1, which is 67 for a model that says nothing but
yes (accuracy 50).

Dense: {dense}.

{tables}

{tuned}

![Against the ratio](results/smolworld_table.png)

![What reconstruction and equal recovery bring](results/smolworld_repairs.png)
"""
COLUMNS = (
    ("accuracy", "POPE accuracy overall"),
    ("F1", "POPE F1 overall"),
    ("random", "POPE F1 random"),
    ("popular", "POPE F1 popular"),
    ("adversarial", "POPE F1 adversarial"),
    ("yes", "POPE yes overall"),
    ("CHAIR_i", "CHAIR_i"),
    ("recall", "recall"),
    ("choice", "choice"),
    ("with picture", "choice with picture"),
    ("perplexity", "loss"),
)


def section(result: Mapping[str, Any]) -> str:
    """The section; what is to be said about the figures is not in it.

    Args:
        result: what `writing.write_table` writes.
    """
    asked, precision = result["questions"], result.get("precision", {})
    told, change = "as planned", precision.get("minus float32", {})
    if differ := precision.get("answers that differ [%]"):
        told = (
            f"which changes {differ['pope']:.1f}% of the dense model's answers to POPE and "
            f"{differ['choice']:.1f}% to multiple choice on the validation split (accuracies by "
            f"{_gain(change['POPE accuracy overall'])} and {_gain(change['choice'])})"
        )
    return SECTION.format(
        command=result["command"],
        device=result["device"],
        threads=result["threads"],
        dtype=precision.get("dtype", "float32"),
        precision=told,
        pope=asked["POPE"],
        captions=asked["captions"],
        choice=asked["multiple choice"],
        dense=", ".join(f"{title} {shown(result['dense'], name)}" for title, name in COLUMNS),
        tables="\n\n".join(_tables(result["cells"])) or "No model is measured yet.",
        tuned=result["tuned"],
    )


def _tables(entries: Sequence[Entry]) -> list[str]:
    found = []
    for repair, title in TITLES.items():
        own = [e for e in entries if e["repair"] == repair]
        if not own:
            continue
        ratios = sorted({e["ratio"] for e in own})
        if len(ratios) > 1:
            found.append(f"{title}: POPE accuracy and multiple choice.\n\n{_by_ratio(own, ratios)}")
        ratio = _fullest(own)
        some = [e for e in own if e["ratio"] == ratio]
        found.append(f"{title}, {ratio:.0%}.\n\n{_one_ratio(some)}")
    return found


def _fullest(entries: Sequence[Entry]) -> float:
    """The ratio with the most rows: that of the fits."""
    counts = Counter(e["ratio"] for e in entries)
    return max(sorted(counts), key=lambda r: counts[r])


def _by_ratio(entries: Sequence[Entry], ratios: Sequence[float]) -> str:
    cells = {(_name(e), e["ratio"]): e["rates"] for e in entries}
    names = list(dict.fromkeys(_name(e) for e in entries))
    whole = [n for n in names if sum((n, r) in cells for r in ratios) > 1]
    rows = [["", *(f"{r:.0%}" for r in ratios)], ["---"] * (1 + len(ratios))]
    for name in whole:
        own = [cells.get((name, r)) for r in ratios]
        pairs = [
            "" if c is None else f"{shown(c, 'POPE accuracy overall')}, {shown(c, 'choice')}"
            for c in own
        ]
        rows.append([name, *pairs])
    return _table(rows)


def _one_ratio(entries: Sequence[Entry]) -> str:
    gains = [n for n in ("minus uniform", "minus dense") if any(n in e for e in entries)]
    head = ["", *(title for title, _ in COLUMNS)]
    head += [f"POPE accuracy {gain}" for gain in gains] + ["seeds"]
    rows = [head, ["---"] * len(head)]
    for e in entries:
        told = [shown(e["rates"], name) for _, name in COLUMNS]
        told += [_gain(e.get(gain, {}).get("POPE accuracy overall")) for gain in gains]
        rows.append([_name(e), *told, str(e["seeds"])])
    return _table(rows)


def _name(entry: Entry) -> str:
    corner = entry["corner"]
    return entry["method"] if corner == "middle" else f"{entry['method']}, {corner}"


def _gain(pair: Sequence[float] | None) -> str:
    return "" if pair is None else f"{pair[0]:+.1f} ± {pair[1]:.1f}"


def shown(rates: Mapping[str, Sequence[float]], name: str) -> str:
    """A rate with its standard error; of a loss the perplexity."""
    if name not in rates:
        return ""
    value, error = rates[name]
    if name == "loss":
        perplexity = math.exp(min(value, 20.0))
        return f"{perplexity:.2f} ± {perplexity * error:.2f}"
    return f"{value:.1f} ± {error:.1f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
