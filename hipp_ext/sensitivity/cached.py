"""Sensitivity as a file: what one process has measured, no process measures again."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext import __version__
from hipp_ext.calibration import TASKS, Calibration
from hipp_ext.errors import CheckpointError
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import seal, unseal
from hipp_ext.fingerprint import model_digest, weights_digest
from hipp_ext.groups import Group
from hipp_ext.sensitivity.curves import LEVELS
from hipp_ext.sensitivity.efforts import Effort, measure_sensitivity
from hipp_ext.sensitivity.positions import positions_digest
from hipp_ext.steps import Steps, fits, identity_key

NAME = "sensitivity"
logger = logging.getLogger(__name__)


def default_cache() -> Path:
    """Folder where the commands keep what they measured: hipp-ext under XDG_CACHE_HOME, or
    ~/.cache.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hipp-ext"


def measured_on(
    model: nn.Module, groups: Sequence[Group], calibration: Calibration, **settings: Any
) -> dict[str, Any]:
    """All that a measurement depends on: version, groups, weights, configuration, the calibration's
    tensors, the positions that count in them, and `settings`.

    Not the device, the number of threads, and versions of other packages, which change rounding.
    """
    return {
        "hipp_ext": __version__,
        "groups": model_digest(model, groups),
        "model": weights_digest(model),
        "calibration": calibration.digest,
        "positions": positions_digest(model, calibration),
        **settings,
    }


def known_sensitivity(
    folder: Path, identity: Mapping[str, Any], groups: Sequence[Group]
) -> Float[Tensor, "tasks groups levels"] | None:
    """The sensitivity of `groups` that was measured on `identity`, see `measured_on`, and kept in
    the folder; None: it was not, or the file is damaged.
    """
    try:
        found, about = unseal(_file(folder, identity))
    except CheckpointError:
        return None
    shapes = {NAME: (len(TASKS), len(groups), len(LEVELS))}
    return found[NAME] if about == identity and fits(found, shapes) else None


def cached_sensitivity(
    model: nn.Module,
    calibration: Calibration,
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    folder: Path,
    identity: Mapping[str, Any],
    *,
    effort: Effort = "anchored",
    seed: int = 0,
    progress: bool = False,
) -> Float[Tensor, "tasks groups levels"]:
    """What `measure_sensitivity` returns, from `folder` or measured.

    What an interrupted measurement has finished is kept in the folder, and not measured again. If
    it cannot be written, nothing is kept, and a note in the log says so. Arguments as for
    `measure_sensitivity` and `known_sensitivity`.
    """
    if (known := known_sensitivity(folder, identity, groups)) is not None:
        return known
    options: Any = {"effort": effort, "seed": seed, "progress": progress}
    with Steps(folder, identity, logger.info) as steps:
        measured = measure_sensitivity(model, calibration, groups, scores, steps=steps, **options)
        try:
            write_atomic(_file(folder, identity), seal({NAME: measured}, identity))
        except OSError as error:
            logger.info(f"the sensitivity is not kept: {error}")
    return measured


def _file(folder: Path, identity: Mapping[str, Any]) -> Path:
    return folder / f"{NAME}-{identity_key(identity)}.safetensors"
