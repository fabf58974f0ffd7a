"""A report's page: one HTML file with everything inside. What users wrote (names, answers, commands) is escaped."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from hipp_ext.evals.disagreements import Disagreement, Example
from hipp_ext.evals.report_sources import Entry, Sources
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
STYLE = Path(__file__).with_name("report.css")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of a report.

    Attributes:
        name: of its PNG file, and its description for those who do not see it.
        section: a key of `SECTIONS`.
        caption: below the picture.
        looks: PNG bytes for "" (light, wide), "dark", "narrow" and "narrow dark".
    """

    name: str
    section: str
    caption: str
    looks: Mapping[str, bytes]


def page(sources: Sources, pictures: Sequence[Picture], differing: Mapping[str, Sequence[Disagreement]]) -> str:
    """The whole page."""
    parts = {name: "".join(_figure(p) for p in pictures if p.section == name) for name in SECTIONS}
    parts["results"] = _results(sources.entries)
    parts["answers"] = _differing(sources.entries[0].name, differing) + _not_compared(sources.entries, differing)
    parts["cost"] += _cost(sources)
    parts["made"] = _made(sources)
    shown = {name: part for name, part in parts.items() if part}
    links = "".join(f'<a href="#{name}">{SECTIONS[name]}</a>' for name in shown)
    body = "".join(f'<section id="{name}"><h2>{SECTIONS[name]}</h2>{part}</section>' for name, part in shown.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>hipp-ext report</title><style>{STYLE.read_text()}</style></head>
<body><main><header><h1>What pruning cost, and where</h1>
<p>{_lead(sources)}</p><nav>{links}</nav></header>
{body}
</main></body></html>
"""


def _lead(sources: Sources) -> str:
    names = ", ".join(f"<b>{escape(e.name)}</b>" for e in sources.entries[1:])
    return f"{names or 'Nothing'} beside <b>{escape(sources.entries[0].name)}</b>. Accuracies in percent, ± one standard error."


# ------------------------------------------------------------------------------------------------------------- sections


def _results(entries: Sequence[Entry]) -> str:
    from hipp_ext.evals.report import table_rows  # it imports this module

    header, rows = table_rows(entries)
    titles = {"rnd": "POPE random", "pop": "POPE popular", "adv": "POPE adversarial", "F1": "POPE F1", "yes": "says yes"}
    wishes = "".join(f"<li><b>{escape(e.name)}</b>: {escape(e.preference)}</li>" for e in entries if e.preference)
    asked = {d: r["n"] for e in entries for d, r in e.records.items()}
    note = (
        "Questions: "
        + ", ".join(f"{escape(d)} {n:,}" for d, n in asked.items())
        + (". POPE by VLMEvalKit's rule, all splits pooled; error bars draw whole pictures.")
    )
    return (
        _table([titles.get(c, c) for c in header], rows)
        + f"<p class=note>{note}</p>"
        + (f"<h3>What each plan was made for</h3><ul>{wishes}</ul>" if wishes else "")
    )


def _differing(dense: str, differing: Mapping[str, Sequence[Disagreement]]) -> str:
    pairs = [(name, own) for name, found in differing.items() for own in found]
    return "".join(
        f"<details{' open' if number == 0 else ''}><summary>{escape(dense)} and {escape(name)} on {escape(own.data)} "
        f"<small>{_points(own)}</small></summary>{_verdict(dense, name, own)}{_cards(dense, name, own)}</details>"
        for number, (name, own) in enumerate(pairs)
    )


def _not_compared(entries: Sequence[Entry], differing: Mapping[str, Sequence[Disagreement]]) -> str:
    dense, *others = entries
    compared = {(name, own.data) for name, found in differing.items() for own in found}
    left = [f"{e.name} on {d}" for e in others for d in e.records if d in dense.records and (e.name, d) not in compared]
    if not left:
        return ""
    why = "Not set side by side, because the answers are not at hand or the questions differ"
    return f"<p class=note>{why}: {escape(', '.join(left))}.</p>"


def _cards(dense: str, name: str, own: Disagreement) -> str:
    return f'<div class="cards">{"".join(_card(dense, name, e) for e in own.examples)}</div>' if own.examples else ""


def _points(own: Disagreement) -> str:
    difference = own.whole.paired.difference
    interval = "" if math.isnan(difference.low) else f" ({difference.low:+.1f} to {difference.high:+.1f})"
    return f"{difference.value:+.1f} points{interval}"


def _verdict(dense: str, name: str, own: Disagreement) -> str:
    paired = own.whole.paired
    shown = f" {len(own.examples)} of them, drawn at random:" if own.examples else ""
    return (
        f"<p>Of {paired.n:,} questions only {escape(dense)} is right on {paired.only_a:,}, only {escape(name)} on "
        f"{paired.only_b:,}: a difference of {_points(own)}, in brackets its 95% interval.{shown}</p>"
    )


def _card(dense: str, name: str, example: Example) -> str:
    question = example.question
    if example.picture:
        style = ' class="pixels"' if example.small else ""
        picture = f'<img{style} alt="the picture of question {escape(question.index)}" src="{example.picture}">'
    else:
        picture = '<div class="missing">picture not at hand</div>'
    options = "".join(f"<li>{escape(letter)}. {escape(text)}</li>" for letter, text in (question.options or {}).items())
    said = "".join(
        f'<dt>{escape(who)}</dt><dd class="{"right" if right else "wrong"}">{_answer(answer, question.options)}</dd>'
        for who, answer, right in ((dense, example.said_a, example.a_is_right), (name, example.said_b, not example.a_is_right))
    )
    split = f'<span class="split">{escape(question.category.replace(",", ", "))}</span>' if question.category else ""
    truth = _answer(question.answer, question.options)
    asked = f'<p class="asked">{escape(question.question)}</p>' + (f"<ol>{options}</ol>" if options else "")
    answers = f"<dl>{said}<dt>truth</dt><dd>{truth}</dd></dl>"
    return f'<article class="card">{picture}<div>{asked}{answers}{split}</div></article>'


def _answer(text: str, options: Mapping[str, str] | None) -> str:
    shown = escape(text[:160]) or "<i>nothing</i>"
    letter = option_letter(text, options) if options else ""
    if options and letter in options and options[letter] not in text:
        shown += f" <small>({escape(options[letter])})</small>"
    return shown


def _cost(sources: Sources) -> str:
    from hipp_ext.evals.bench.latency import speedup_text, spread_text

    parts = []
    for result in sources.latency:
        rows = [
            [name, f"{row['parameters'] / 1e6:.2f}M", f"{row['prefill_gflops']:.2f}", spread_text(row["prefill_ms"]),
             spread_text(row["decode_ms"]), speedup_text(row), f"{row['weights_mib']:.1f}", f"{row['peak_mib']:.1f}"]
            for name, row in result["models"].items()
        ]  # fmt: skip
        header = ["model", "parameters", "GFLOPs of the prompt", "first token [ms]", "further token [ms]",
                  "faster (first, further)", "weights [MiB]", "peak [MiB]"]  # fmt: skip
        parts.append(_table(header, rows, "long") + f"<p class=note>{_conditions(result)}</p>")
    if not parts and (sized := [e for e in sources.entries if e.parameters]):
        parts.append(_table(["model", "parameters"], [[e.name, f"{e.parameters / 1e6:.2f}M"] for e in sized if e.parameters]))
        parts.append("<p class=note>Latency and memory were not measured: "
                     "<code>hipp bench latency DENSE PRUNED -o DIR/latency.json</code>.</p>")  # fmt: skip
    return "".join(parts)


def _conditions(result: Mapping[str, Any]) -> str:
    load = result["load"]
    return (
        f"{escape(str(result['device']))}, {result['threads']} threads, batch {load['rows']}; median (quartiles) of "
        f"{load['repeats']} runs, the models taking turns, after {load['warmup']} that do not count."
    )


def _made(sources: Sources) -> str:
    settings = dict.fromkeys(
        f"{e.name} on {d}: {', '.join(f'{k} {v}' for k, v in r['settings'].items())}; model {r['model_hash'][:12]}, data "
        f"{r['data_hash'][:12]}" for e in sources.entries for d, r in e.records.items()
    )  # fmt: skip
    seeds = [*sources.seeds, "bootstrap of the error bars: seed 0, 1,000 draws (5,000 for differences)",
             "example questions: seed 0", "decoding: greedy"]  # fmt: skip
    parts = [("Commands", "\n".join(sources.commands) or "not recorded"), ("Seeds", "\n".join(seeds)),
             ("Evaluations", "\n".join(settings))]  # fmt: skip
    return "".join(f"<h3>{title}</h3><pre>{escape(text)}</pre>" for title, text in parts)


# --------------------------------------------------------------------------------------------------------------- pieces


def _figure(picture: Picture) -> str:
    """The picture in the look that fits the reader's screen."""
    looks = {name: f"data:image/png;base64,{base64.b64encode(data).decode()}" for name, data in picture.looks.items()}
    small, dark = "(max-width: 640px)", "(prefers-color-scheme: dark)"
    sources = "".join(
        f'<source media="{media}" srcset="{looks[name]}">'
        for name, media in (("narrow dark", f"{small} and {dark}"), ("narrow", small), ("dark", dark))
    )
    alt = escape(picture.name.replace("_", " "))
    return (f'<figure><picture>{sources}<img alt="{alt}" src="{looks[""]}"></picture>'
            f"<figcaption>{escape(picture.caption)}</figcaption></figure>")  # fmt: skip


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "") -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in header)
    cells = [zip(header, row, strict=True) for row in rows]
    body = "".join(
        "<tr>" + "".join(f'<td data-label="{escape(name)}">{escape(str(c))}</td>' for name, c in row) + "</tr>" for row in cells
    )
    return f'<div class="wide {kind}" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
