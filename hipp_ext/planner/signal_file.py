"""Signals as a file: sealed safetensors, whose header says what they belong to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor

from hipp_ext.calibration import TASKS
from hipp_ext.errors import CheckpointError
from hipp_ext.files.sealed import seal, unseal
from hipp_ext.groups import Group
from hipp_ext.plan import MAX_GROUPS, MAX_UNITS
from hipp_ext.planner.columns import TRANSFORMS
from hipp_ext.planner.state import Signals
from hipp_ext.sensitivity.measured import DROP_LEVELS, PRUNE_LEVELS


def _check_groups(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Refuse groups whose numbers no model has."""
    for g in groups:
        if not (
            g.owns
            and 1 <= g.width <= MAX_UNITS
            and 0 <= g.layer < 2**31
            and 1 <= g.columns < 2**31
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
    digest: str
    calibration: str

    def build(self, tensors: Mapping[str, Tensor]) -> Signals:
        """The signals.

        Raises:
            CheckpointError: a tensor is missing, or has another shape than the groups require, or
                values that cannot have been measured.
        """
        n = len(self.groups)
        shapes: dict[str, tuple[int, ...]] = {f"scores.{g.name}": (g.width,) for g in self.groups}
        shapes |= {k: (n,) for name in TRANSFORMS if (k := f"columns.{name}") in tensors}
        drops = tensors["sensitivity"].shape[-1:] == (len(DROP_LEVELS),)
        shapes["sensitivity"] = (len(TASKS), n, len(DROP_LEVELS if drops else PRUNE_LEVELS))
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
            groups=self.groups,
            scorer=self.scorer,
            digest=self.digest,
            calibration=self.calibration,
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
