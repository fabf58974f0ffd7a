"""What a report does not show, and the command that measures it."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hipp_ext.evals.report.entries import Entry, Sources
from hipp_ext.evals.report.verdict import Verdict

_SHOWN = 3  # names of models in a command; the others are "..."


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Something that was not measured.

    Attributes:
        what: what it is, and of which models.
        command: what measures it, or adds it to the report.
    """

    what: str
    command: str


def missing(sources: Sources, verdicts: Sequence[Verdict]) -> list[Missing]:
    """What a reader may look for in vain."""
    return [Missing(what=what, command=command) for what, command in _missing(sources, verdicts)]


def _missing(sources: Sources, verdicts: Sequence[Verdict]) -> Iterator[tuple[str, str]]:
    entries = sources.entries
    dense, *others = entries
    if not sources.dense_is_known:
        yield (
            f"Which model is the dense one: nothing tells it, so {dense.name}, the first one, was "
            "taken.",
            "hipp report DIR... DENSE, with the folder of the dense model",
        )
    unsized = [e for e in entries if e.parameters is None]
    if unsized:
        yield (
            f"Size of {_names(unsized)}: the folder was not given.",
            f"hipp report DIR... {_folders(unsized)}",
        )
    planless = [e for e in others if e.plan is None and e not in unsized]
    if planless:
        yield (
            f"What was removed from {_names(planless)}: no folder with a plan was given.",
            f"hipp report DIR... {_folders(planless)}",
        )
    timed = {name for one in sources.latency for name in one["models"]}
    if untimed := [e for e in entries if e.name not in timed]:
        yield (
            f"Time and memory of {_names(untimed)}.",
            f"hipp latency {_folders(entries)} -o latency.json",
        )
    served = {name for one in sources.served for name in one["models"]}
    if unserved := [e for e in entries if e.name not in served]:
        yield (
            f"Speed in the runtime that serves {_names(unserved)}.",
            f"hipp latency {_folders(entries)} --runtime llama.cpp -o served.json"
            " (or --runtime vllm)",
        )
    if silent := [e for e in entries if not e.chair]:
        yield (
            f"Objects that captions of {_names(silent)} invent (CHAIR).",
            f"hipp chair {_folder(silent[0])}" + (", and the others" if silent[1:] else ""),
        )
    asked = dict.fromkeys(data for e in entries for data in e.records)
    for data in asked:
        if unasked := [e for e in entries if data not in e.records]:
            yield (
                f"{data} of {_names(unasked)}.",
                f"vlmeval --data {shlex.quote(data)} --model {_folders(unasked)}",
            )
    for verdict in verdicts:
        if verdict.not_compared:
            yield (
                f"{verdict.name} beside {dense.name} on {', '.join(verdict.not_compared)}, question"
                " by question: the answers were not found, or the questions differ.",
                "hipp report OUTPUTS ..., with the folder of answers that vlmeval wrote",
            )


def _names(entries: Sequence[Entry]) -> str:
    return ", ".join(e.name for e in entries)


def _folder(entry: Entry) -> str:
    return shlex.quote(f"./{entry.folder}")


def _folders(entries: Sequence[Entry]) -> str:
    return " ".join([*map(_folder, entries[:_SHOWN]), *(["..."] if entries[_SHOWN:] else [])])
