"""Runs the comparison: every version in every runtime, one file per runtime."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hipp_ext.evals.runtimes import Serving, measure_folders
from hipp_ext.evals.studies.serving.versions import about
from hipp_ext.files import write_atomic


def setting_name(serving: Serving) -> str:
    """Runtime and type of weights, such as "llama.cpp q8_0"."""
    return f"{serving.runtime} {serving.weights}"


def measure_setting(folder: Path, models: Mapping[str, Path], serving: Serving) -> dict[str, Any]:
    """The figures of all models in one runtime; read from `folder` where they are known."""
    file = folder / f"{setting_name(serving).replace(' ', '_')}.json"
    if file.exists():
        known = json.loads(file.read_text())
        if known["serving"] == asdict(serving) and set(known["models"]) == set(models):
            return known
    found = {"serving": asdict(serving), "models": measure_folders(models, serving)}
    write_atomic(file, json.dumps(found, indent=1))
    return found


def summarize(models: Mapping[str, Path], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the versions, and their figures in each runtime."""
    facts = {name: json.loads(about(folder).read_text()) for name, folder in models.items()}
    return {"models": facts, "settings": dict(settings)}
