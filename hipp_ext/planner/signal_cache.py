"""Signals on disk: what was measured of a model once is not measured again, by whichever process."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError
from torch import nn

from hipp_ext.calibration import Calibration, CalibrationLike
from hipp_ext.errors import CheckpointError
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import seal, unseal
from hipp_ext.groups import find_groups
from hipp_ext.planner.state import Signals, measure_signals, model_digest
from hipp_ext.planner.storage import SignalsHeader, signal_tensors
from hipp_ext.scorers import MRS

FORMAT = 5  # part of every file's name: counts up when signals come to mean something else


def default_cache() -> Path:
    """Where the commands keep signals: hipp-ext under XDG_CACHE_HOME, or under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hipp-ext"


def cached_signals(
    model: nn.Module,
    calibration: CalibrationLike | None,
    folder: Path,
    *,
    mrs: MRS | None = None,
    progress: Callable[[str], None] | None = None,
    bar: bool = False,
) -> Signals:
    """The signals of this model on this calibration from `folder`, or measured now (by WandaSP) and put there.

    A file's name is a digest of the model's groups, of a sample of all its weights, of the calibration's tensors and of how MRS
    is measured. A file that is not as it was written, by a bit, is measured again, and so is one whose signals are of something
    else than its name says; a folder that cannot be written costs only the measurement. Arguments as for `measure_signals`.
    """
    say = progress or (lambda _: None)
    groups, given = find_groups(model), Calibration.of(model, calibration)
    wanted = model_digest(model, groups), given.digest
    key = f"{FORMAT} {wanted[0]} {wanted[1]} {mrs and mrs.name}"
    path = folder / f"signals-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    if path.exists():
        try:
            signals = _read(path)
            if (signals.digest, signals.calibration, signals.mrs is None) != (
                *wanted,
                mrs is None,
            ) or signals.groups != groups:
                raise CheckpointError("it holds other signals than its name says")
        except (CheckpointError, ValidationError, KeyError, TypeError) as error:
            say(f"{path} is damaged ({type(error).__name__}): measuring again")
        else:
            say(f"signals as measured before: {path}")
            return signals
    signals = measure_signals(model, given, mrs=mrs, groups=groups, progress=progress, bar=bar)
    try:
        header = {"signals": SignalsHeader.of(signals).model_dump(mode="json")}
        write_atomic(path, seal(signal_tensors(signals), header))
    except OSError as error:
        say(f"signals are not kept: {error}")
    return signals


def _read(path: Path) -> Signals:
    tensors, about = unseal(path)
    return SignalsHeader.model_validate(about["signals"]).build(tensors)
