"""Reads what a report shows: models with their scores, plans and costs, fits with their fronts, and
commands.

The files in a folder tell what it is: summary.json (`hipp demo`), results.json (`vlmeval`),
planner.json (`hipp fit`), config.json and weights (a model), or a JSON file of `hipp latency`.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hipp_ext.errors import DataError, PlanError
from hipp_ext.evals.drawing import visual_by_kind
from hipp_ext.evals.report_types import MAX_MODELS, Latency, Record, Summary, checked
from hipp_ext.files import content_hash, write_atomic
from hipp_ext.files.untrusted import is_below, read_json
from hipp_ext.model_folder import read_folder
from hipp_ext.plan import PruningPlan
from hipp_ext.planner.archive import Archive
from hipp_ext.planner.fit import ARCHIVE
from hipp_ext.planner.reward import Reward
from hipp_ext.preference import Preference
from hipp_ext.runs import IDENTITY
from hipp_ext.surgery.checkpoint import read_plan

SUMMARY, LATENCY = "summary.json", "latency.json"
_MARKS = ("results.json", "planner.json", "config.json")
_DEPTH = 4  # levels of folders that are searched, as in DIR/outputs/MODEL/DATA/results.json


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One evaluated model.

    Attributes:
        name: name of the model in tables and figures.
        preference: preference of its plan, as text; None if unknown, and for the dense model.
        plan: its plan; None for the dense model, and if its folder was not given.
        reward: reward of the plan by the planner's evaluator; None if it was not computed.
        parameters: number of parameters of the whole model; None if its folder was not given.
        records: results by data set, as `vlmeval` writes them to results.json.
    """

    name: str
    preference: str | None = None
    plan: PruningPlan | None = None
    reward: Reward | None = None
    parameters: int | None = None
    records: dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted planner: its archive, and the visual sensitivity per layer of each kind."""

    name: str
    archive: Archive
    visual: dict[str, list[float]] | None


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The contents of a report.

    Attributes:
        entries: evaluated models; the others are compared with the first.
        fits: fitted planners.
        latency: results of `hipp latency`.
        commands: commands that made them, in order.
        seeds: random seeds, as text.
    """

    entries: tuple[Entry, ...] = ()
    fits: tuple[Fit, ...] = ()
    latency: tuple[dict[str, Any], ...] = ()
    commands: tuple[str, ...] = ()
    seeds: tuple[str, ...] = ()


def main_yes_no(entries: Sequence[Entry]) -> str | None:
    """The yes/no data set that a report shows by split: POPE, else the first one."""
    found = [
        data
        for e in entries
        for data, record in e.records.items()
        if "official" in record["metrics"]
    ]
    return "POPE" if "POPE" in found else next(iter(found), None)


def write_summary(
    folder: str | Path,
    entries: Sequence[Entry],
    commands: Sequence[str],
    seeds: Sequence[str],
    planner: str | None = None,
) -> None:
    """Write the contents of a report to `folder`/summary.json.

    Args:
        folder: folder of the file.
        entries: evaluated models.
        commands: commands that made them.
        seeds: random seeds, as text.
        planner: folder of the planner, relative to `folder`.
    """
    rows = [
        vars(e)
        | {
            "plan": e.plan.to_json() if e.plan else None,
            "reward": e.reward.as_dict() if e.reward else None,
        }
        for e in entries
    ]
    data = {"entries": rows, "commands": list(commands), "seeds": list(seeds), "planner": planner}
    write_atomic(Path(folder) / SUMMARY, json.dumps(data, indent=1) + "\n")


def read_sources(paths: Sequence[str | Path]) -> Sources:
    """The contents of several folders (or latency files) together.

    Raises:
        DataError: one of them holds nothing to report, no model was evaluated, or a file is
            damaged.
        CheckpointError, PlanError: a planner or a plan is damaged.
    """
    parts = [_read(Path(path).expanduser()) for path in paths]
    models = {k: v for _, found in parts for k, v in found.items()}
    entries = _distinct([e for part, _ in parts for e in part.entries])
    entries = [_with_folder(e, models) for e in entries]
    if not entries:
        raise DataError(
            f"{', '.join(map(str, paths))}: no evaluated model. `vlmeval` or `hipp demo` "
            "evaluates one"
        )
    if len(entries) > MAX_MODELS:
        raise DataError(
            f"{', '.join(map(str, paths))}: {len(entries)} evaluated models; a report holds "
            f"{MAX_MODELS}. Name fewer"
        )
    dense = [e for e in entries if e.plan is None and e.parameters is not None] or entries[:1]
    entries = [dense[0], *(e for e in entries if e is not dense[0])]
    return Sources(
        entries=tuple(entries),
        fits=tuple(f for part, _ in parts for f in part.fits),
        latency=tuple(one for part, _ in parts for one in part.latency),
        commands=tuple(
            dict.fromkeys(
                command
                for part, _ in parts
                for command in (*part.commands, *(one["command"] for one in part.latency))
            )
        ),
        seeds=tuple(
            dict.fromkeys(
                seed
                for part, _ in parts
                for seed in (*part.seeds, *map(_latency_seed, part.latency))
            )
        ),
    )


def _read(path: Path) -> tuple[Sources, dict[str, Path]]:
    """The contents of one path, and its model folders by name."""
    if path.is_file():
        return Sources(latency=(_latency(path),)), {}
    if not path.is_dir():
        raise DataError(f"{path} is not a folder")
    if (path / SUMMARY).is_file():
        return _read_summary(path), {}
    found: dict[str, list[Path]] = {name: [] for name in (*_MARKS, LATENCY, IDENTITY)}
    for folder, names in _folders(path):
        for name in found.keys() & set(names):
            found[name].append(folder)
    if not any(found.values()):
        raise DataError(
            f"{path} holds nothing to report: no summary.json (`hipp demo`), `vlmeval` results, "
            "planner, model, latency.json"
        )
    records = [
        checked(Record, _json(file), f"{file} is damaged")
        for file in (folder / "results.json" for folder in found["results.json"])
    ]
    return Sources(
        entries=tuple(_entries(records)),
        fits=tuple(map(_fit, found["planner.json"])),
        latency=tuple(_latency(folder / LATENCY) for folder in found[LATENCY]),
        commands=tuple(command for record in records if (command := record.get("command"))),
        seeds=tuple(_fit_seed(f) for f in found[IDENTITY] if (f / ARCHIVE).exists()),
    ), {folder.resolve().name: folder for folder in found["config.json"]}


def _folders(path: Path) -> Iterator[tuple[Path, list[str]]]:
    for folder, inside, names in os.walk(path):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        if len(Path(folder).relative_to(path).parts) >= _DEPTH:
            inside.clear()
        yield Path(folder), names


def _read_summary(folder: Path) -> Sources:
    file = folder / SUMMARY
    data = checked(Summary, _json(file), f"{file} is damaged")
    entries = tuple(_entry(row, file) for row in data["entries"])
    planner = folder / data["planner"] if data["planner"] else None
    if planner is not None and not is_below(planner, folder):
        raise DataError(
            f"{file} is damaged: its planner {data['planner']!r} leads out of the folder"
        )
    return Sources(
        entries=entries,
        fits=(_fit(planner),) if planner and os.path.isdir(planner) else (),
        latency=(_latency(folder / LATENCY),) if (folder / LATENCY).is_file() else (),
        commands=tuple(data["commands"]),
        seeds=tuple(data["seeds"]),
    )


def _entry(row: Mapping[str, Any], file: Path) -> Entry:
    try:
        plan = PruningPlan.from_json(row["plan"]) if row["plan"] else None
    except PlanError as error:
        raise DataError(f"{file} is damaged: the plan of {row['name']!r}: {error}") from None
    reward = Reward(**row["reward"]) if row["reward"] else None
    return Entry(**{**row, "plan": plan, "reward": reward})


def _entries(records: Sequence[dict[str, Any]]) -> list[Entry]:
    """One entry per name and content of a model."""
    by_model: dict[tuple[str, str], Entry] = {}
    for record in records:
        entry = by_model.setdefault(
            (record["model"], record["model_hash"]), Entry(name=record["model"], records={})
        )
        entry.records[record["data"]] = record
    return list(by_model.values())


def _distinct(entries: Sequence[Entry]) -> list[Entry]:
    """The entries, one per model; different models of one name get the start of their hash."""
    kept: dict[str, Entry] = {}
    for entry in entries:
        digest = next((r["model_hash"] for r in entry.records.values()), entry.name)
        old = kept.get(digest)
        kept[digest] = replace(old, records={**entry.records, **old.records}) if old else entry
    names = [e.name for e in kept.values()]
    return [
        replace(e, name=f"{e.name} ({digest[:8]})") if names.count(e.name) > 1 else e
        for digest, e in kept.items()
    ]


def _with_folder(entry: Entry, models: Mapping[str, Path]) -> Entry:
    """The entry with plan and size, if its folder was given and is the one that was evaluated."""
    record = next(iter(entry.records.values()), None)
    folder = models.get(record["model"]) if record and entry.parameters is None else None
    if record is None or folder is None or content_hash(folder) != record["model_hash"]:
        return entry
    plan = read_plan(folder)
    preference = str(Preference(*plan.preference)) if plan and plan.preference else None
    parameters = sum(map(math.prod, read_folder(folder).shapes.values()))
    return replace(entry, plan=plan, parameters=parameters, preference=preference)


def _fit(folder: Path) -> Fit:
    from hipp_ext.planner import HiPPPlanner

    planner = HiPPPlanner.load(folder)
    signals = planner.signals
    return Fit(
        name=folder.resolve().parent.name if folder.name == "planner" else folder.name,
        archive=planner.archive,
        visual=None if signals is None else visual_by_kind(signals),
    )


def _latency(file: Path) -> dict[str, Any]:
    return checked(Latency, _json(file), f"{file} is not a result of `hipp latency`")


def _fit_seed(folder: Path) -> str:
    identity = _json(folder / IDENTITY).get("identity")
    settings = identity.get("settings") if isinstance(identity, dict) else None
    known = [
        f"{name} {value}"
        for name, value in (settings.items() if isinstance(settings, dict) else ())
        if not any(isinstance(v, dict | list) for v in (value if type(value) is list else [value]))
    ]
    return f"fit {folder.name}: {', '.join(known)}"


def _latency_seed(result: Mapping[str, Any]) -> str:
    return f"latency: seed {result['load'].get('seed')} of its picture and prompts"


def _json(file: Path) -> dict[str, Any]:
    try:
        data = read_json(file)
    except DataError as error:
        raise DataError(f"{file} is damaged: {error}") from None
    if not isinstance(data, dict):
        raise DataError(f"{file} is damaged: an object is needed")
    return data
