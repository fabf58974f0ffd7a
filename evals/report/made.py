"""How what is on the page was made: commands, machines, dates, seeds, settings."""

from collections.abc import Iterator, Mapping
from typing import Any

from hipp_ext.evals.report.entries import Sources

_NOT_IN_FILES = (
    "`hipp plan`, `hipp prune` and `hipp fit` do not write their commands to their folders."
)
NOTES = (
    "bootstrap of the error bars: seed 0, 1,000 draws (5,000 for differences)",
    "example questions: seed 0",
    "decoding: greedy",
)


def made(sources: Sources) -> list[tuple[str, str]]:
    """(title, text) of every block."""
    commands = list(sources.commands) or ["no command is recorded"]
    measured = dict.fromkeys(f"{what}: {machine(one)}" for what, one in _measured(sources))
    settings = dict.fromkeys(
        f"{e.name} on {d}: {', '.join(f'{k} {v}' for k, v in r['settings'].items())}; model "
        f"{r['model_hash'][:12]}" + (f", data {r['data_hash'][:12]}" if "data_hash" in r else "")
        for e in sources.entries
        for d, r in [*e.records.items(), *((f"captions ({c['data']})", c) for c in e.chair)]
    )
    blocks = {
        "Commands": [*commands, _NOT_IN_FILES],
        "When and on what": list(measured),
        "Seeds": [*sources.seeds, *NOTES],
        "Evaluations": list(settings),
    }
    return [(title, "\n".join(lines)) for title, lines in blocks.items() if lines]


def _measured(sources: Sources) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(what was measured, when and on what)."""
    for e in sources.entries:
        for data, record in e.records.items():
            yield f"{data} of {e.name}", record.get("made") or {}
        for one in e.chair:
            yield f"captions ({one['data']}, {one['n']:,}) of {e.name}", one.get("made") or {}
    for one in sources.latency:
        yield f"time and memory of {', '.join(one['models'])}", one
    for one in sources.served:
        yield f"{one['serving']['runtime']} with {', '.join(one['models'])}", one


def machine(one: Mapping[str, Any]) -> str:
    """Date, device, threads and versions of a measurement, as far as they are recorded."""
    threads = one.get("threads")
    parts = [
        (one.get("date") or "date not recorded").replace("T", " ").replace("+00:00", " UTC"),
        one.get("device") or "hardware not recorded",
        f"{threads} threads" if threads is not None else "",
        ", ".join(f"{name} {number}" for name, number in (one.get("versions") or {}).items())
        or "versions not recorded",
    ]
    return "; ".join(filter(None, parts))


def conditions(one: Mapping[str, Any]) -> str:
    """The conditions of a measurement of time and memory."""
    if load := one.get("load"):
        how = (
            f"Batch {load['rows']}; median (quartiles) of {load['repeats']} runs, the models "
            f"taking turns, after {load['warmup']} warm-up runs."
        )
    else:
        own = one["serving"]
        how = (
            f"{own['runtime']}, weights {own['weights']}, one prompt of {own['tokens']} tokens, "
            f"{own['new_tokens']} tokens written; median (least to most) of {own['rounds']} "
            "rounds, each in a new process, the models taking turns."
        )
    return f"{how} Measured: {machine(one)}."
