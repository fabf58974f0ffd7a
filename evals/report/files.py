"""Single files and folders that a report shows: times, planners, the settings of a fit."""

from pathlib import Path
from typing import Any

from hipp_ext.errors import DataError
from hipp_ext.evals.drawing import visual_by_kind
from hipp_ext.evals.record_types import Record, checked
from hipp_ext.evals.report.entries import Fit
from hipp_ext.evals.report.timing_types import Latency, Served
from hipp_ext.evals.report.types import Chair
from hipp_ext.files.untrusted import read_json
from hipp_ext.runs import IDENTITY

LATENCY = "latency.json"


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DataError: the file holds something else.
    """
    try:
        data = read_json(file)
    except DataError as error:
        raise DataError(f"{file} is damaged: {error}") from None
    if not isinstance(data, dict):
        raise DataError(f"{file} is damaged: an object is needed")
    return data


def read_record(file: Path) -> dict[str, Any]:
    """A results.json of `vlmeval`."""
    return checked(Record, read_object(file), f"{file} is damaged")


def read_chair(file: Path) -> dict[str, Any]:
    """A scores.json of `hipp chair`."""
    return checked(Chair, read_object(file), f"{file} is damaged")


def read_timing(file: Path) -> dict[str, Any]:
    """A result of `hipp latency`, which has the key "load", or of `hipp latency --runtime`, which
    has the key "serving".
    """
    data = read_object(file)
    if "serving" in data:
        return checked(Served, data, f"{file} is not a result of `hipp latency --runtime`")
    return checked(Latency, data, f"{file} is not a result of `hipp latency`")


def is_timing(file: Path) -> bool:
    """Whether a file that was found beside others is to be read by `read_timing`. A table of
    `hipp latency --per-block`, which is for plans, is not.
    """
    return file.name == LATENCY or not {"prefill", "decode"} <= read_object(file).keys()


def read_fit(folder: Path) -> Fit:
    """A fitted planner."""
    from hipp_ext.planner import HiPPPlanner

    planner = HiPPPlanner.load(folder)
    signals = planner.signals
    return Fit(
        name=folder.resolve().parent.name if folder.name == "planner" else folder.name,
        history=planner.history,
        signals=signals,
        visual=None if signals is None else visual_by_kind(signals),
    )


def fit_settings(folder: Path) -> str:
    """The settings of the fit in a folder, as a line of text."""
    identity = read_object(folder / IDENTITY).get("identity")
    settings = identity.get("settings") if isinstance(identity, dict) else None
    known = [
        f"{name} {value}"
        for name, value in (settings.items() if isinstance(settings, dict) else ())
        if not any(isinstance(v, dict | list) for v in (value if type(value) is list else [value]))
    ]
    return f"fit {folder.name}: {', '.join(known)}"
