"""Signals on disk: what one process has measured of a model, no process measures again."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import ValidationError
from torch import nn

from hipp_ext.calibration import Calibration, CalibrationLike
from hipp_ext.errors import CheckpointError
from hipp_ext.files import write_atomic
from hipp_ext.groups import find_groups
from hipp_ext.planner.signal_file import read_signals, sealed_signals
from hipp_ext.planner.state import Signals, measure_signals, model_digest
from hipp_ext.scorers import MRS
from hipp_ext.sensitivity.measured import PRUNE_LEVELS

FORMAT = 1  # part of every file's name: increases when the meaning of signals changes


def default_cache() -> Path:
    """Folder where the commands keep signals: hipp-ext under XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hipp-ext"


def cached_signals(
    model: nn.Module,
    calibration: CalibrationLike | None,
    folder: Path,
    *,
    mrs: MRS | None = None,
    levels: Sequence[float] = PRUNE_LEVELS,
    log: Callable[[str], None] | None = None,
    progress: bool = False,
) -> Signals:
    """The signals of this model on this calibration, from `folder` or measured (by WandaSP).

    The name of a file is a digest of the model's groups, of a sample of all its weights, of the
    calibration's tensors, of how MRS is measured and of the levels. Signals are measured again
    where a file is not as it was written, or holds other signals than its name says. If the folder
    cannot be written, the signals are not kept. Arguments as for `measure_signals`.
    """
    log = log or (lambda _: None)
    groups, given = find_groups(model), Calibration.of(model, calibration)
    expected = model_digest(model, groups), given.digest
    key = f"{FORMAT} {expected[0]} {expected[1]} {mrs and mrs.name} {len(levels)}"
    path = folder / f"signals-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    if path.exists():
        try:
            signals = read_signals(path)
            found = signals.digest, signals.calibration, "mrs" in signals.columns, signals.levels
            if found != (*expected, mrs is not None, len(levels)) or signals.groups != groups:
                raise CheckpointError("it holds other signals than its name says")
        except (CheckpointError, ValidationError, KeyError, TypeError) as error:
            log(f"{path} is damaged ({type(error).__name__}): measuring again")
        else:
            log(f"signals as measured before: {path}")
            return signals
    signals = measure_signals(
        model, given, mrs=mrs, groups=groups, levels=levels, log=log, progress=progress
    )
    try:
        write_atomic(path, sealed_signals(signals))
    except OSError as error:
        log(f"signals are not kept: {error}")
    return signals
