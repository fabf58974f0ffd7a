"""Signals as files: what one process has measured of a model, no process measures again.

A file is sealed safetensors, whose header says what the signals belong to.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from hipp_ext.calibration import TASKS, Calibration, CalibrationLike
from hipp_ext.errors import CheckpointError
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import seal, unseal
from hipp_ext.fingerprint import model_digest
from hipp_ext.groups import Group, LeftWhole, find_groups
from hipp_ext.plan import MAX_GROUPS, MAX_UNITS
from hipp_ext.planner.columns import TRANSFORMS
from hipp_ext.planner.state import Signals, measure_signals
from hipp_ext.scorers import MRS, Scorer, WandaSP
from hipp_ext.sensitivity.cached import measured_on
from hipp_ext.sensitivity.curves import LEVELS
from hipp_ext.sensitivity.efforts import Announce, Effort
from hipp_ext.steps import Steps, identity_key

FORMAT = 3  # increases when the meaning of signals changes


def cached_signals(
    model: nn.Module,
    calibration: CalibrationLike | None,
    folder: Path,
    *,
    scorer: Scorer | None = None,
    mrs: MRS | None = None,
    groups: Sequence[Group] | None = None,
    effort: Effort = "anchored",
    log: Callable[[str], None] | None = None,
    progress: bool = False,
    announce: Announce | None = None,
) -> Signals:
    """The signals of this model on this calibration, from `folder` or measured.

    The name of a file is a digest of all that signals depend on, see `measured_on`. Signals are
    measured again where a file is not as it was written, or holds other signals than its name says.
    What an interrupted measurement has finished is kept beside the files, and not measured again.
    If the folder cannot be written, nothing is kept. Arguments as for `measure_signals`; the scorer
    is one of `hipp_ext.scorers`, whose name says all that its scores depend on.
    """
    log = log or (lambda _: None)
    groups = find_groups(model) if groups is None else tuple(groups)
    given = Calibration.of(model, calibration)
    scorer = scorer or WandaSP()
    names = {"scorer": scorer.name, "mrs": mrs and mrs.name}
    identity = measured_on(model, groups, given, format=FORMAT, effort=effort, **names)
    expected = model_digest(model, groups), given.digest, effort, scorer.name
    path = folder / f"signals-{identity_key(identity)}.safetensors"
    if path.exists():
        try:
            signals = read_signals(path)
            found = signals.digest, signals.calibration, signals.effort, signals.scorer
            same = signals.groups == groups and ("mrs" in signals.columns) == (mrs is not None)
            if found != expected or not same:
                raise CheckpointError("it holds other signals than its name says")
        except (CheckpointError, ValidationError, KeyError, TypeError) as error:
            log(f"{path} is damaged ({type(error).__name__}): measuring again")
        else:
            log(f"signals as measured before: {path}")
            return signals
    options: dict[str, Any] = {"scorer": scorer, "mrs": mrs, "groups": groups, "effort": effort}
    options |= {"log": log, "progress": progress, "announce": announce}
    with Steps(folder, identity, log) as steps:
        signals = measure_signals(model, given, steps=steps, **options)
        try:
            write_atomic(path, sealed_signals(signals))
        except OSError as error:
            log(f"signals are not kept: {error}")
    return signals


def _check_groups(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Refuse groups whose numbers no model has."""
    for g in groups:
        if not (
            g.owns
            and 1 <= g.width <= MAX_UNITS
            and 0 <= g.layer < 2**31
            and 1 <= g.columns < 2**31
            and 1 <= g.inputs < 2**31
            and 1 <= g.least <= g.width
            and 1 <= g.sections <= g.width
            and not g.width % g.sections
            and g.unit_flops < 2**62
        ):
            raise ValueError(f"{g.name} is no group of a model")
    if len({g.name for g in groups}) != len(groups) or not groups:
        raise ValueError("there are no groups, or two of a name")
    if min(g.unit_parameters for g in groups) < 1 or sum(g.parameters for g in groups) >= 2**62:
        raise ValueError("no model has so many parameters")
    return groups


class SignalsHeader(BaseModel):
    """What signals belong to, see `Signals`."""

    model_config = ConfigDict(extra="forbid")
    groups: Annotated[
        tuple[Group, ...], Field(max_length=MAX_GROUPS), AfterValidator(_check_groups)
    ]
    scorer: str
    effort: Effort
    digest: str
    calibration: str
    left_whole: Annotated[tuple[LeftWhole, ...], Field(max_length=MAX_GROUPS)] = ()

    def build(self, tensors: Mapping[str, Tensor]) -> Signals:
        """The signals.

        Raises:
            CheckpointError: a tensor is missing, or has another shape than the groups require, or
                values that cannot have been measured.
        """
        n = len(self.groups)
        shapes: dict[str, tuple[int, ...]] = {f"scores.{g.name}": (g.width,) for g in self.groups}
        shapes |= {k: (n,) for name in TRANSFORMS if (k := f"columns.{name}") in tensors}
        shapes["sensitivity"] = (len(TASKS), n, len(LEVELS))
        for name, shape in shapes.items():
            values = tensors[name]
            if (
                values.dtype != torch.float32
                or values.shape != shape
                or not bool(values.isfinite().all())
            ):
                raise CheckpointError(
                    f"{name} is no signal: {values.dtype} of shape {tuple(values.shape)}."
                )
            if not name.startswith("scores.") and bool((values < 0).any()):
                raise CheckpointError(f"{name} is below zero.")
        return Signals(
            **dict(self),
            sensitivity=tensors["sensitivity"],
            scores={g.name: tensors[f"scores.{g.name}"] for g in self.groups},
            columns={k: tensors[f"columns.{k}"] for k in TRANSFORMS if f"columns.{k}" in shapes},
        )


def signal_tensors(signals: Signals) -> dict[str, Tensor]:
    """The signals as named tensors."""
    tensors = {"sensitivity": signals.sensitivity}
    for part in ("scores", "columns"):
        tensors |= {f"{part}.{n}": t for n, t in getattr(signals, part).items()}
    return tensors


def sealed_signals(signals: Signals) -> bytes:
    """The contents of a signals file."""
    header = SignalsHeader(**{k: getattr(signals, k) for k in SignalsHeader.model_fields})
    return seal(signal_tensors(signals), {"signals": header.model_dump(mode="json")})


def read_signals(path: Path) -> Signals:
    """The signals of a file.

    Raises:
        CheckpointError, ValidationError, KeyError, TypeError: the file is damaged.
    """
    tensors, about = unseal(path)
    return SignalsHeader.model_validate(about["signals"]).build(tensors)
