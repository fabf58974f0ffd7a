"""summary.json, in which `hipp demo` keeps the contents of its report."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hipp_ext.errors import DataError, PlanError
from hipp_ext.evals.record_types import checked
from hipp_ext.evals.report.entries import Entry, Sources
from hipp_ext.evals.report.files import read_fit, read_object
from hipp_ext.evals.report.types import Summary
from hipp_ext.files import write_atomic
from hipp_ext.files.untrusted import is_below
from hipp_ext.plan import PruningPlan
from hipp_ext.planner.reward import Reward

SUMMARY = "summary.json"


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
        {
            "name": e.name,
            "preference": e.preference,
            "plan": e.plan.to_json() if e.plan else None,
            "reward": e.reward.as_dict() if e.reward else None,
            "parameters": e.parameters,
            "records": e.records,
        }
        for e in entries
    ]
    data = {"entries": rows, "commands": list(commands), "seeds": list(seeds), "planner": planner}
    write_atomic(Path(folder) / SUMMARY, json.dumps(data, indent=1) + "\n")


def read_summary(folder: Path) -> Sources:
    """The contents of `folder`/summary.json, with its planner.

    Raises:
        DataError: one of them is damaged.
        CheckpointError: the planner is damaged.
    """
    file = folder / SUMMARY
    data = checked(Summary, read_object(file), f"{file} is damaged")
    entries = tuple(_entry(row, file) for row in data["entries"])
    planner = folder / data["planner"] if data["planner"] else None
    if planner is not None and not is_below(planner, folder):
        raise DataError(
            f"{file} is damaged: its planner {data['planner']!r} leads out of the folder"
        )
    return Sources(
        entries=entries,
        fits=(read_fit(planner),) if planner and os.path.isdir(planner) else (),
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
