"""The page of a report: one HTML file without external parts, from report.html.jinja."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipp_ext.evals.compare import split_counts
from hipp_ext.evals.disagreements import Disagreement
from hipp_ext.evals.latency import COST_COLUMNS, cost_rows
from hipp_ext.evals.report_sources import Entry, Sources, main_yes_no
from hipp_ext.evals.report_table import table_rows
from hipp_ext.evals.scienceqa import option_letter

SECTIONS = {
    "results": "Results",
    "front": "The front",
    "kept": "What was kept",
    "pope": "POPE by split",
    "answers": "Where they disagree",
    "cost": "Cost",
    "made": "How it was made",
}
TEMPLATE = "report.html.jinja"
_TITLES = {
    "rnd": "POPE random",
    "pop": "POPE popular",
    "adv": "POPE adversarial",
    "F1": "POPE F1",
    "yes": "says yes",
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure of a report.

    Attributes:
        name: name of its PNG file, and its description for screen readers.
        section: a key of `SECTIONS`.
        caption: text below the figure.
        svg: the figure as an SVG element, which is put into the page as it is.
    """

    name: str
    section: str
    caption: str
    svg: str


@dataclass(frozen=True, kw_only=True)
class _Table:
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    kind: str = ""


def page(
    sources: Sources, pictures: Sequence[Picture], differing: Mapping[str, Sequence[Disagreement]]
) -> str:
    """The HTML of the page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    entries = sources.entries
    header, rows = table_rows(entries)
    costs = [
        (_Table(header=COST_COLUMNS, rows=cost_rows(one), kind="long"), _conditions(one))
        for one in sources.latency
    ]
    text = templates.get_template(TEMPLATE).render(
        sections=SECTIONS,
        pictures=pictures,
        meaning=_meaning,
        dense=entries[0].name,
        others=[e.name for e in entries[1:]],
        scores=_Table(header=[_TITLES.get(c, c) for c in header], rows=rows),
        questions=_questions(entries),
        preferences=[(e.name, e.preference) for e in entries if e.preference],
        differing=[(name, own) for name, found in differing.items() for own in found],
        not_compared=_not_compared(entries, differing),
        costs=costs,
        sizes=None if costs else _sizes(entries),
        made=_made(sources),
    )
    # JSON can contain half characters, which a file cannot.
    return text.encode("utf-8", "replace").decode()


def _questions(entries: Sequence[Entry]) -> str:
    asked = {d: r["n"] for e in entries for d, r in e.records.items()}
    parts = [
        f"Questions: {', '.join(f'{d} {n:,}' for d, n in asked.items())}.",
        "Yes and no by VLMEvalKit's rule, POPE with all splits pooled; the standard errors are "
        "over images.",
    ]
    if "MME" in asked:
        parts.append("MME's perception is out of 2,000, its cognition out of 800.")
    main = main_yes_no(entries)
    for record in (e.records[main] for e in entries if main is not None and main in e.records):
        pooled = record["metrics"]["vlmeval"].get("overall", {}).get("n", 0)
        if pooled > record["n"]:
            return " ".join([*parts, split_counts(str(main), record["n"], pooled)])
    return " ".join(parts)


def _not_compared(entries: Sequence[Entry], differing: Mapping[str, Sequence[Disagreement]]) -> str:
    dense, *others = entries
    compared = {(name, own.data) for name, found in differing.items() for own in found}
    left = [
        f"{e.name} on {d}"
        for e in others
        for d in e.records
        if d in dense.records and (e.name, d) not in compared
    ]
    return ", ".join(left)


def _meaning(text: str, options: Mapping[str, str] | None) -> str:
    """Text of the option that an answer means, if the answer does not contain it; else empty."""
    letter = option_letter(text, options) if options else ""
    return options[letter] if options and letter in options and options[letter] not in text else ""


def _conditions(result: Mapping[str, Any]) -> str:
    load = result["load"]
    return (
        f"{result['device']}, {result['threads']} threads, batch {load['rows']}; median "
        f"(quartiles) of {load['repeats']} runs, the models taking turns, after {load['warmup']} "
        "warm-up runs."
    )


def _sizes(entries: Sequence[Entry]) -> _Table | None:
    rows = [[e.name, f"{e.parameters / 1e6:.2f}M"] for e in entries if e.parameters]
    return _Table(header=["model", "parameters"], rows=rows) if rows else None


def _made(sources: Sources) -> list[tuple[str, str]]:
    settings = dict.fromkeys(
        f"{e.name} on {d}: {', '.join(f'{k} {v}' for k, v in r['settings'].items())}; model "
        f"{r['model_hash'][:12]}, data {r['data_hash'][:12]}"
        for e in sources.entries
        for d, r in e.records.items()
    )
    seeds = [
        *sources.seeds,
        "bootstrap of the error bars: seed 0, 1,000 draws (5,000 for differences)",
        "example questions: seed 0",
        "decoding: greedy",
    ]
    return [
        ("Commands", "\n".join(sources.commands) or "not recorded"),
        ("Seeds", "\n".join(seeds)),
        ("Evaluations", "\n".join(settings)),
    ]
