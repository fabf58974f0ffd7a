"""The page of a report: one HTML file without external parts, from page.html.jinja."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from hipp_ext import __version__
from hipp_ext.evals.compare import split_counts
from hipp_ext.evals.figures import marks
from hipp_ext.evals.latency import COST_COLUMNS, cost_rows
from hipp_ext.evals.report.answers import answers
from hipp_ext.evals.report.captions import CHAIR_COLUMNS, chair_rows
from hipp_ext.evals.report.disagreements import Disagreement
from hipp_ext.evals.report.entries import Entry, Sources, main_yes_no
from hipp_ext.evals.report.made import conditions, made
from hipp_ext.evals.report.missing import missing
from hipp_ext.evals.report.table import table_rows
from hipp_ext.evals.report.verdict import verdicts
from hipp_ext.evals.report.words import difference, verdict_line
from hipp_ext.evals.runtime_table import RUNTIME_COLUMNS, runtime_rows
from hipp_ext.evals.scienceqa import option_letter

SECTIONS = {
    "results": ("Every score", "by data set and split, with standard errors"),
    "answers": ("Where they disagree", "questions with pictures, drawn at random"),
    "captions": ("Objects in captions (CHAIR)", "what models name that is not in the picture"),
    "cost": ("Time and memory", "first token, further tokens, memory, FLOPs"),
    "kept": ("What was kept", "layer by layer"),
    "front": ("The search", "size against skill of every plan that was tried"),
    "missing": ("Not measured", "and the commands that measure it"),
    "made": ("How it was made", "commands, machines, dates, seeds"),
}
TEMPLATE = "page.html.jinja"
_TITLES = {
    "rnd": "POPE random",
    "pop": "POPE popular",
    "adv": "POPE adversarial",
    "F1": "POPE F1",
    "yes": "says yes",
    "size": "parameters",
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
    note: str = ""
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
    found = verdicts(sources, differing)
    header, rows = table_rows(sources.entries)
    scores = _Table(header=[_TITLES.get(c, c) for c in header], rows=rows)
    text = templates.get_template(TEMPLATE).render(
        sections=SECTIONS,
        pictures=pictures,
        meaning=_meaning,
        difference=difference,
        dense=sources.names[0],
        colours={name: mark.number for name, mark in marks(sources.names).items()},
        today=f"{date.today():%d %B %Y}",
        version=__version__,
        verdicts={v.name: verdict_line(v) for v in found},
        answers=answers(found),
        scores=scores,
        questions=_questions(sources.entries),
        preferences=[(e.name, e.preference) for e in sources.entries if e.preference],
        differing=[(name, own) for name, all_own in differing.items() for own in all_own],
        captions=_captions(sources),
        costs=list(_costs(sources)),
        missing=missing(sources, found),
        made=made(sources),
    )
    # JSON can contain half characters, which a file cannot.
    return text.encode("utf-8", "replace").decode()


def _questions(entries: Sequence[Entry]) -> str:
    asked = {d: r["n"] for e in entries for d, r in e.records.items()}
    if not asked:
        return ""
    main = main_yes_no(entries)
    parts = ["Removed: share of the parameters that can be pruned."]
    parts += [f"Questions: {', '.join(f'{d} {n:,}' for d, n in asked.items())}."]
    if main is not None:
        parts.append(
            f"{main} by VLMEvalKit's rule, all splits pooled; standard errors are over images."
        )
    if "MME" in asked:
        parts.append("MME's perception is out of 2,000, its cognition out of 800.")
    for record in (e.records[main] for e in entries if main is not None and main in e.records):
        pooled = record["metrics"]["vlmeval"].get("overall", {}).get("n", 0)
        if pooled > record["n"]:
            return " ".join([*parts, split_counts(str(main), record["n"], pooled)])
    return " ".join(parts)


def _captions(sources: Sources) -> _Table | None:
    rows = chair_rows(sources.entries)
    note = "Percent, ± one standard error over images. Lower CHAIR and higher recall are better."
    return _Table(header=CHAIR_COLUMNS, rows=rows, note=note, kind="long") if rows else None


def _costs(sources: Sources) -> Iterator[_Table]:
    for one in sources.latency:
        rows = cost_rows(one)
        yield _Table(header=COST_COLUMNS, rows=rows, note=conditions(one), kind="long")
    for one in sources.served:
        rows = runtime_rows(one["models"])
        yield _Table(header=RUNTIME_COLUMNS, rows=rows, note=conditions(one), kind="long")


def _meaning(text: str, options: Mapping[str, str] | None) -> str:
    """Text of the option that an answer means, if the answer does not contain it; else empty."""
    letter = option_letter(text, options) if options else ""
    return options[letter] if options and letter in options and options[letter] not in text else ""
