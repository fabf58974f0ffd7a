"""Reads what a report shows: the contents of several folders and files together."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hipp_ext.errors import DataError
from hipp_ext.evals.report.entries import Entry, Sources
from hipp_ext.evals.report.folders import read_path
from hipp_ext.evals.report.timing_types import MAX_MODELS
from hipp_ext.files import content_hash
from hipp_ext.model_folder import read_folder
from hipp_ext.preference import Preference
from hipp_ext.surgery.checkpoint import read_plan


def read_sources(paths: Sequence[str | Path]) -> Sources:
    """The contents of several folders (or latency files) together.

    Raises:
        DataError: one of them holds nothing to report, no model was evaluated, or a file is
            damaged.
        CheckpointError, PlanError: a planner or a plan is damaged.
    """
    parts = [read_path(Path(path).expanduser()) for path in paths]
    models = {k: v for _, found in parts for k, v in found.items()}
    entries = _distinct([e for part, _ in parts for e in part.entries])
    entries = [_with_folder(e, models) for e in entries]
    where = ", ".join(map(str, paths))
    if not entries:
        raise DataError(f"{where}: no evaluated model. `vlmeval` or `hipp demo` evaluates one")
    if len(entries) > MAX_MODELS:
        raise DataError(
            f"{where}: {len(entries)} evaluated models; a report holds {MAX_MODELS}. Name fewer"
        )
    latency = tuple(one for part, _ in parts for one in part.latency)
    both = [one for part, _ in parts for one in (*part.latency, *part.served)]
    dense = _dense(entries, both)
    first = dense or entries[0]
    entries = [_with_size(e, latency) for e in (first, *(e for e in entries if e is not first))]
    fits = tuple(f for part, _ in parts for f in part.fits)
    known = [f.history.command for f in fits if f.history.command]
    known += [c for e in entries if e.plan is not None for c in e.plan.commands]
    known += [c for part, _ in parts for c in part.commands]
    known += [one["command"] for one in both if one.get("command")]
    seeds = [seed for part, _ in parts for seed in (*part.seeds, *map(_seed, part.latency))]
    return Sources(
        entries=tuple(entries),
        dense_is_known=dense is not None or len(entries) == 1,
        fits=fits,
        latency=latency,
        served=tuple(one for part, _ in parts for one in part.served),
        commands=tuple(dict.fromkeys(known)),
        seeds=tuple(dict.fromkeys(seeds)),
    )


def _dense(entries: Sequence[Entry], timed: Sequence[Mapping[str, Any]]) -> Entry | None:
    """The dense model: one whose folder has no plan, else the one that measurements of time compare
    others with.
    """
    whole = [e for e in entries if e.plan is None and e.parameters is not None]
    firsts = [next(iter(one["models"])) for one in timed]
    return next(iter([*whole, *(e for name in firsts for e in entries if e.name == name)]), None)


def _hash(entry: Entry) -> str:
    """The content of the model where it is known, else its name."""
    known = (one["model_hash"] for one in (*entry.records.values(), *entry.chair))
    return next(known, entry.name)


def _distinct(entries: Sequence[Entry]) -> list[Entry]:
    """The entries, one per model; different models of one name get the start of their hash."""
    kept: dict[str, Entry] = {}
    for entry in entries:
        digest = _hash(entry)
        old = kept.get(digest, entry)
        records = {**entry.records, **old.records}
        chair = [*old.chair, *(one for one in entry.chair if one not in old.chair)]
        kept[digest] = replace(old, records=records, chair=tuple(chair))
    names = [e.name for e in kept.values()]
    return [
        replace(e, name=f"{e.name} ({digest[:8]})") if names.count(e.name) > 1 else e
        for digest, e in kept.items()
    ]


def _with_folder(entry: Entry, models: Mapping[str, Path]) -> Entry:
    """The entry with plan and size, if its folder was given and is the one that was evaluated."""
    folder = models.get(entry.folder) if entry.parameters is None else None
    if folder is None or content_hash(folder) != _hash(entry):
        return entry
    plan = read_plan(folder)
    preference = str(Preference(*plan.preference)) if plan and plan.preference else None
    parameters = sum(map(math.prod, read_folder(folder).shapes.values()))
    return replace(entry, plan=plan, parameters=parameters, preference=preference)


def _with_size(entry: Entry, latency: Sequence[Mapping[str, Any]]) -> Entry:
    """The entry with the size that `hipp latency` counted, if no folder told it."""
    counted = (one["models"][entry.name] for one in latency if entry.name in one["models"])
    parameters = next((row["parameters"] for row in counted), None)
    return entry if entry.parameters else replace(entry, parameters=parameters)


def _seed(result: Mapping[str, Any]) -> str:
    return f"latency: seed {result['load'].get('seed')} of its picture and prompts"
