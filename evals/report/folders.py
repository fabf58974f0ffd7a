"""Reads one folder, or one file of times. The files in a folder tell what it is: summary.json
(`hipp demo`), results.json (`vlmeval`), scores.json (`hipp chair`), planner.json (`hipp fit`),
config.json and weights (a model), or JSON files of `hipp latency`.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hipp_ext.errors import DataError
from hipp_ext.evals.report import files
from hipp_ext.evals.report.entries import Entry, Sources
from hipp_ext.evals.report.summary import SUMMARY, read_summary
from hipp_ext.planner.fit import ARCHIVE
from hipp_ext.runs import IDENTITY

RECORD, CHAIR, PLANNER, MODEL = "results.json", "scores.json", "planner.json", "config.json"
_DEPTH = 5  # levels of folders that are searched, as in DIR/outputs/MODEL/CHAIR/run/scores.json


def read_path(path: Path) -> tuple[Sources, dict[str, Path]]:
    """The contents of one path, and its model folders by name."""
    if path.is_file():
        return _timings([path]), {}
    if not path.is_dir():
        raise DataError(f"{path} is not a folder")
    found = dict(_found(path))
    if not (path / SUMMARY).is_file() and not any(found.values()):
        raise DataError(
            f"{path} holds nothing to report: no summary.json (`hipp demo`), `vlmeval` or `hipp "
            "chair` results, planner, model, latency.json"
        )
    chair = list(map(files.read_chair, found[CHAIR]))
    timings = _timings([file for file in found[files.LATENCY] if files.is_timing(file)])
    if (path / SUMMARY).is_file():
        made = read_summary(path)
        entries = (*made.entries, *_entries([], chair))
        return replace(made, entries=entries, latency=timings.latency, served=timings.served), {}
    records = list(map(files.read_record, found[RECORD]))
    return replace(
        timings,
        entries=tuple(_entries(records, chair)),
        fits=tuple(files.read_fit(file.parent) for file in found[PLANNER]),
        commands=tuple(command for one in (*records, *chair) if (command := one.get("command"))),
        seeds=tuple(
            files.fit_settings(file.parent)
            for file in found[IDENTITY]
            if (file.parent / ARCHIVE).exists()
        ),
    ), {file.parent.resolve().name: file.parent for file in found[MODEL]}


def _found(path: Path) -> Iterator[tuple[str, list[Path]]]:
    """The name of each kind of file, and the files of that kind."""
    seen = list(_folders(path))
    for name in (RECORD, PLANNER, MODEL, IDENTITY):
        yield name, [folder / name for folder, names in seen if name in names]
    # A scores.json of something else can lie anywhere; that of `hipp chair` lies in CHAIR-DATA/run.
    yield (
        CHAIR,
        [f / CHAIR for f, names in seen if CHAIR in names and f.parent.name.startswith("CHAIR-")],
    )
    yield (
        files.LATENCY,
        [
            folder / name
            for folder, names in seen
            for name in sorted(names)
            if name.startswith(("latency", "served")) and name.endswith(".json")
        ],
    )


def _folders(path: Path) -> Iterator[tuple[Path, list[str]]]:
    for folder, inside, names in os.walk(path):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        if len(Path(folder).relative_to(path).parts) >= _DEPTH:
            inside.clear()
        yield Path(folder), names


def _timings(paths: Sequence[Path]) -> Sources:
    read = list(map(files.read_timing, paths))
    return Sources(
        latency=tuple(one for one in read if "load" in one),
        served=tuple(one for one in read if "serving" in one),
    )


def _entries(records: Sequence[dict[str, Any]], chair: Sequence[dict[str, Any]]) -> list[Entry]:
    """One entry per name and content of a model."""
    by_model: dict[tuple[str, str], Entry] = {}
    for one in (*records, *chair):
        key = (one["model"], one["model_hash"])
        entry = by_model.setdefault(key, Entry(name=one["model"], records={}))
        if "metrics" in one:
            entry.records[one["data"]] = one
        else:
            by_model[key] = replace(entry, chair=(*entry.chair, one))
    return list(by_model.values())
