"""Signals on disk: what was measured of a model once is not measured again, by whichever process."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from pydantic import ValidationError
from torch import nn

from hipp_ext.calibration import ROWS, Calibration, calibration_by_task, calibration_digest
from hipp_ext.files import write_atomic
from hipp_ext.groups import find_groups
from hipp_ext.planner.state import Signals, measure_signals, model_digest
from hipp_ext.planner.storage import SignalsHeader, signal_tensors
from hipp_ext.scorers import MRS

FORMAT = 4  # part of every file's name: counts up when signals come to mean something else


def default_cache() -> Path:
    """Where the commands keep signals: hipp-ext under XDG_CACHE_HOME, or under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hipp-ext"


def cached_signals(
    model: nn.Module, calibration: Calibration | None, folder: Path, *, processor: Any = None, rows: int = ROWS,
    mrs: MRS | None = None, progress: Callable[[str], None] | None = None,
) -> Signals:  # fmt: skip
    """The signals of this model on this calibration from `folder`, or measured now (by WandaSP) and put there.

    A file's name is a digest of the model's groups, of a sample of all its weights, of the calibration's tensors and of how MRS
    is measured. A damaged file, or a folder that cannot be written, costs only the measurement. Arguments as for
    `measure_signals`.
    """
    say = progress or (lambda _: None)
    groups, tasks = find_groups(model), calibration_by_task(model, calibration, processor, rows)
    key = f"{FORMAT} {model_digest(model, groups)} {calibration_digest(tasks)} {mrs and mrs.name}"
    path = folder / f"signals-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    if path.exists():
        try:
            signals = _read(path)
        except (OSError, ValidationError, safetensors.SafetensorError, KeyError, TypeError) as error:
            say(f"{path} is damaged ({type(error).__name__}): measuring again")
        else:
            say(f"signals as measured before: {path}")
            return signals
    signals = measure_signals(model, tasks, mrs=mrs, groups=groups, progress=progress)
    try:
        header = {"signals": SignalsHeader.of(signals).model_dump_json()}
        write_atomic(path, safetensors.torch.save(signal_tensors(signals), header))
    except OSError as error:
        say(f"signals are not kept: {error}")
    return signals


def _read(path: Path) -> Signals:
    with safetensors.safe_open(path, "pt") as file:
        header = SignalsHeader.model_validate_json(file.metadata()["signals"])
        return header.build({k: file.get_tensor(k) for k in file.keys()})  # noqa: SIM118 (not a dict)
