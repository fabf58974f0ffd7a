"""How what is on the page was made: commands, machines, dates, seeds, settings."""

from collections.abc import Iterator, Mapping
from typing import Any

from hipp_ext.evals.report.entries import Sources

NOTES = (
    "bootstrap of the error bars: seed 0, 1,000 draws (5,000 for differences)",
    "example questions: seed 0",
    "decoding: greedy",
)


def made(sources: Sources) -> list[tuple[str, str]]:
    """(title, text) of every block."""
    commands = list(sources.commands) or ["no command is recorded"]
    commands += [f"({line})" for line in _in_python(sources)]
    where: dict[str, dict[str, None]] = {}
    for what, one in _measured(sources):
        where.setdefault(machine(one), {})[f"  {_date(one)}: {what}"] = None
    asked: dict[str, dict[str, None]] = {}
    for e in sources.entries:
        for d, r in [*e.records.items(), *((f"captions ({c['data']})", c) for c in e.chair)]:
            data = f" (content {r['data_hash'][:12]})" if "data_hash" in r else ""
            line = f"  {d}{data}: {e.name} (content {r['model_hash'][:12]})"
            settings = ", ".join(f"{k} {v}" for k, v in r["settings"].items())
            asked.setdefault(settings, {})[line] = None
    blocks = {
        "Commands": commands,
        "When and on what": [line for own, lines in where.items() for line in (own, *lines)],
        "Seeds": [*sources.seeds, *NOTES],
        "Evaluations": [line for own, lines in asked.items() for line in (own, *lines)],
    }
    return [(title, "\n".join(lines)) for title, lines in blocks.items() if lines]


def _in_python(sources: Sources) -> Iterator[str]:
    """What was made without a command."""
    if fits := [f.name for f in sources.fits if f.history.command is None]:
        yield f"not fitted by a command: {', '.join(fits)}"
    if plans := [e.name for e in sources.entries if e.plan is not None and not e.plan.commands]:
        yield f"not planned and pruned by commands: {', '.join(plans)}"


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


def _date(one: Mapping[str, Any]) -> str:
    return (one.get("date") or "date not recorded").replace("T", " ").replace("+00:00", " UTC")


def machine(one: Mapping[str, Any]) -> str:
    """Device, threads and versions of a measurement, as far as they are recorded."""
    threads = one.get("threads")
    versions = one.get("versions") or {}
    parts = [
        one.get("device") or "hardware not recorded",
        "" if threads is None else "1 thread" if threads == 1 else f"{threads} threads",
        ", ".join(f"{name} {number}" for name, number in versions.items())
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
    if (load or one["serving"]).get("quick"):
        how += " A quick look, not for comparisons."
    return f"{how} Measured: {_date(one)}; {machine(one)}."
