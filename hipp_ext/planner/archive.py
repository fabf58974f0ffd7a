"""Every evaluated plan, one JSON line each, and the Pareto front of them."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import moocore
import numpy as np
import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from hipp_ext.errors import CheckpointError, WriteError
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import text_digest
from hipp_ext.groups import Group
from hipp_ext.plan import MAX_GROUPS, MAX_UNITS
from hipp_ext.planner.reward import DEFAULT_ENDS, Reward

REFERENCE_POINT = (0.0, 0.0, 0.0)  # of the hypervolume: guessing on both tasks, nothing removed
NADIR_FRACTION = 0.1  # of the plans: those that save most give the nadir of a task
MIN_OBJECTIVE_RANGE = 0.02  # an objective that varies less keeps its default ends
MAX_BYTES = 256 << 20  # of a file: some two million plans of ten groups
SEAL = ',"sha256":"'  # before the digest of a line
Count = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Logit = Annotated[float, Field(allow_inf_nan=False)]


class Record(BaseModel):
    """One evaluated plan.

    Attributes:
        step: round of the fit.
        index: number of the rollout within its round.
        preference: preference that it was drawn for.
        pruning_ratio: budget that was asked for; the reward's compression is what came out.
        allocation: logit of each group.
        keep_counts: keep count of each group.
        reward: measured reward.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    step: Count
    index: Count
    preference: tuple[Fraction, Fraction, Fraction]
    pruning_ratio: Fraction
    allocation: Annotated[tuple[Logit, ...], Field(max_length=MAX_GROUPS)]
    keep_counts: Annotated[
        tuple[Annotated[int, Field(ge=0, le=MAX_UNITS)], ...], Field(max_length=MAX_GROUPS)
    ]
    reward: Reward

    @model_validator(mode="after")
    def _bounded(self) -> "Record":
        """Infinity would end the process inside the hypervolume's library."""
        if not self.reward.bounded:
            raise ValueError(f"no plan has such a reward: {self.reward}")
        return self

    def to_line(self) -> str:
        """The record as a line of an archive, with its digest at the end."""
        text = self.model_dump_json()
        return f'{text[:-1]}{SEAL}{text_digest(text)[:16]}"}}\n'

    @classmethod
    def from_line(cls, line: str) -> "Record":
        """The record of a line from `to_line`.

        Raises:
            ValueError: the line was changed, or is no record.
        """
        head, seal, digest = line.rpartition(SEAL)
        if not seal or digest != f'{text_digest(head + "}")[:16]}"}}':
            raise ValueError("it is not as it was written")
        return cls.model_validate_json(head + "}")


class Archive:
    """Records in the order of their evaluation; with a path, also in a JSONL file.

    The file survives kill -9: half a last line is dropped when it is read.
    """

    def __init__(self, path: str | Path | None = None, records: Sequence[Record] = ()):
        """Read the archive at `path`, if there is one, or begin with `records`, without a file.

        Raises:
            CheckpointError: a line other than the last is not a record as it was written, or the
                path is no file, or the file is too large.
        """
        self.path = Path(path) if path is not None else None
        self.records: list[Record] = list(records)
        if self.path is not None and self.path.exists():
            if not self.path.is_file() or self.path.stat().st_size > MAX_BYTES:
                raise CheckpointError(
                    f"{self.path} is no file, or has more than {MAX_BYTES} bytes."
                )
            lines = self.path.read_text(errors="replace").split("\n")
            for number, line in enumerate(lines, 1):
                try:
                    if line:
                        self.records.append(Record.from_line(line))
                except ValueError as error:
                    if number < len(lines):
                        raise CheckpointError(
                            f"{self.path}, line {number}, is not a record: {str(error)[:500]}"
                        ) from None

    def append(self, records: Sequence[Record]) -> None:
        """Add records and write them out.

        Raises:
            WriteError: the disk is full, or the folder is not writable.
        """
        self.records.extend(records)
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write("".join(r.to_line() for r in records))
                    file.flush()
                    os.fsync(file.fileno())  # before the checkpoint that counts on them
            except OSError as error:
                raise WriteError(
                    f"{self.path} could not be written: {error.strerror}. What was finished is "
                    "kept."
                ) from error

    def keep_steps_before(self, step: int) -> list[Record]:
        """Remove and return the records of `step` and later; half a last line goes too."""
        later = [r for r in self.records if r.step >= step]
        self.records = [r for r in self.records if r.step < step]
        if self.path is not None and self.path.exists():
            write_atomic(self.path, "".join(r.to_line() for r in self.records))
        return later

    def __len__(self) -> int:
        return len(self.records)

    @property
    def measured(self) -> list[Record]:
        """The evaluated plans, each once."""
        return list({r.keep_counts: r for r in self.records}.values())

    def front(self) -> list[Record]:
        """The records that no other dominates, by compression; no two are alike."""
        measured = self.measured
        if not measured:
            return []
        points = np.array([r.reward.objectives() for r in measured])
        keep = moocore.is_nondominated(points, maximise=True, keep_weakly=False)
        return sorted(
            (r for r, k in zip(measured, keep, strict=True) if k),
            key=lambda r: r.reward.compression,
        )

    def hypervolume(self) -> float:
        """Hypervolume of the front above REFERENCE_POINT; 0 for an empty archive."""
        return _hypervolume(np.array([r.reward.objectives() for r in self.records]))

    def nadir_and_ideal(self) -> Float[Tensor, "2 3"]:
        """(nadir, ideal) point, by which the objectives are normalised.

        The ideal is the best measured value of each objective. The nadir of a task is the best
        among the plans that save most; of compression it is zero. So a weight of 0.5 reaches about
        half of an objective's range, whether that is 50 points of accuracy or 5.

        Source: normalisation by nadir and ideal point, Miettinen, Nonlinear Multiobjective
        Optimization (1999), section 2.4.
        Differs from it: the nadir does not count that one task can be given away for the other.
        """
        measured = torch.tensor([r.reward.objectives() for r in self.records]).reshape(-1, 3)
        if not len(measured) or measured[:, 2].max() - measured[:, 2].min() < MIN_OBJECTIVE_RANGE:
            return DEFAULT_ENDS  # at a fixed budget, compression costs nothing
        most = measured[measured[:, 2].topk(math.ceil(NADIR_FRACTION * len(measured))).indices]
        nadir, ideal = most.amax(0), measured.amax(0)
        nadir[2] = 0.0
        return torch.where(
            ideal - nadir >= MIN_OBJECTIVE_RANGE, torch.stack([nadir, ideal]), DEFAULT_ENDS
        )


def fit_groups(records: Sequence[Record], groups: Sequence[Group]) -> bool:
    """Whether the records can be plans for these groups."""
    widths = [g.width for g in groups]
    return all(
        len(r.allocation) == len(r.keep_counts) == len(widths)
        and all(0 <= k <= w for k, w in zip(r.keep_counts, widths, strict=True))
        for r in records
    )


def hypervolume_gains(
    points: Float[Tensor, "points 3"], front: np.ndarray
) -> Float[Tensor, " points"]:
    """How much each point alone would add to the hypervolume of `front` (points, 3), maximised."""
    assert bool(points.isfinite().all()) and bool(np.isfinite(front).all()), (
        "moocore ends the process at infinity"
    )
    front = front[moocore.is_nondominated(front, maximise=True)] if len(front) else front
    before, gains = _hypervolume(front), []
    for point in points.double().numpy():
        dominated = bool((front >= point).all(1).any())
        gains.append(0.0 if dominated else _hypervolume(np.vstack([front, point])) - before)
    return torch.tensor(gains)


def _hypervolume(points: np.ndarray) -> float:
    if not len(points):
        return 0.0
    return float(moocore.hypervolume(points, ref=list(REFERENCE_POINT), maximise=True))
