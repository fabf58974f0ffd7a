"""Checkpoints of a run on several processes: a folder per step, and a file that names one.

Each rank writes its own files, and the first one also what is common: the weights, and the
optimizers unless every process has its own. When all files are there, the first rank switches
progress.safetensors to the new step, and only then the older folders are removed, but that of the
best evaluation. So the step in this file is complete, whenever the run is killed.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from hipp_ext.comm import LQSGDState, load_state, save_state
from hipp_ext.comm.checkpoint import rank_file
from hipp_ext.errors import CheckpointError
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import UNREADABLE, seal, unseal
from hipp_ext.recover.parameters import trained
from hipp_ext.runs import RunFolder
from hipp_ext.training import load_optimizers, optimizer_tensors, spread_as, whole_tensor

PROGRESS = "progress.safetensors"
VISIBLE_SECONDS = 90  # until a new file is seen everywhere: NFS looks again after a minute
POLL_SECONDS = 0.2
WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"


class Progress(BaseModel):
    """What a run has done.

    Attributes:
        step: number of finished steps.
        losses: loss of every step.
        evaluations: what was measured, by name, with the "step" after which.
        skipped: row that could not be used -> the reason.
        rows, tokens: rows and tokens that were learnt from; repeated ones count again.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    step: int = Field(default=0, ge=0, lt=2**53)
    losses: list[float] = []
    evaluations: list[dict[str, float]] = []
    skipped: dict[str, str] = {}
    rows: int = Field(default=0, ge=0)
    tokens: int = Field(default=0, ge=0)

    @property
    def best_step(self) -> int | None:
        """The step of the first evaluation with the least loss; None without held-out rows."""
        lost = [e for e in self.evaluations if "loss" in e]
        return int(min(lost, key=lambda e: e["loss"])["step"]) if lost else None

    @property
    def since_best(self) -> int:
        """Number of evaluations after the best one."""
        return sum(e["step"] > (self.best_step or 0) for e in self.evaluations)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: folder of the run.
        identity: what must be equal for the run to go on; see `RunFolder`.
        rank: number of this process.
        barrier: function that waits for the other processes.
        alone: whether every process has optimizers of its own.

    Raises:
        CheckpointError: the folder holds another run.
        OutputBusyError: another process works in the folder.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        rank: int,
        barrier: Callable[[], None],
        *,
        alone: bool = False,
    ):
        self.rank, self.barrier, self.alone = rank, barrier, alone
        self.optimizer_file = f"optimizer.rank{rank}.safetensors" if alone else OPTIMIZER
        # A run that failed before its first checkpoint does not keep others out.
        self.run = RunFolder(folder, identity, begun=_has_progress, owner=rank == 0)

    def check_shared(self, gathered: Callable[[bool], list[bool]]) -> None:
        """Raise unless all processes see the folder of the first one. All of them call this.

        Args:
            gathered: function that returns the values of all processes.

        Raises:
            CheckpointError: on all processes, if a process sees another folder.
        """
        limit = time.monotonic() + VISIBLE_SECONDS
        self.barrier()  # the first process has made the folder
        while not (seen := self.run.is_there) and time.monotonic() < limit:
            time.sleep(POLL_SECONDS)
        if missing := [rank for rank, own in enumerate(gathered(seen)) if not own]:
            raise CheckpointError(
                f"{self.run.path} is not the same folder for all processes: what process 0 writes "
                f"there is not seen by {', '.join(map(str, missing))}. It must be on a disk that "
                "all of them share."
            )

    def save(
        self, progress: Progress, model: nn.Module, optimizers: list[Any], state: LQSGDState | None
    ) -> None:
        """Write the checkpoint of `progress`. All ranks call this."""
        folder = self._folder(progress.step)
        folder.mkdir(parents=True, exist_ok=True)
        if state is not None:
            save_state(state, rank_file(folder, self.rank))
        weights = {name: whole_tensor(p.detach()) for name, p in trained(model).items()}
        moments = optimizer_tensors(optimizers)
        if self.rank == 0:
            write_atomic(folder / WEIGHTS, seal(weights))
        if self.rank == 0 or self.alone:
            write_atomic(folder / self.optimizer_file, seal(moments))
        self.barrier()
        if self.rank == 0:
            write_atomic(self.run / PROGRESS, seal({}, progress.model_dump()))
            self._sweep(progress)

    def load(self, model: nn.Module, optimizers: list[Any], state: LQSGDState | None) -> Progress:
        """Load the last checkpoint into model, optimizers and state; its progress is returned.

        Raises:
            CheckpointError: the checkpoint is damaged.
        """
        if not (self.run / PROGRESS).exists():
            return Progress()
        try:
            progress = Progress.model_validate(unseal(self.run / PROGRESS)[1])
            folder = self._folder(progress.step)
            self._load_weights(model, progress.step)
            load_optimizers(optimizers, unseal(folder / self.optimizer_file)[0])
        except UNREADABLE as error:
            raise self.run.damaged(error) from error
        if state is not None:
            load_state(state, rank_file(folder, self.rank))
        if self.rank == 0:
            self._sweep(progress)
        return progress

    def load_weights(self, model: nn.Module, step: int) -> None:
        """Load the weights of a step that is kept.

        Raises:
            CheckpointError: they are damaged.
        """
        try:
            self._load_weights(model, step)
        except UNREADABLE as error:
            raise self.run.damaged(error) from error

    def _load_weights(self, model: nn.Module, step: int) -> None:
        weights, _ = unseal(self._folder(step) / WEIGHTS)
        with torch.no_grad():
            for name, p in trained(model).items():
                p.copy_(_fitting(weights[name], p))

    def _folder(self, step: int) -> Path:
        return self.run / f"step-{step}"

    def _sweep(self, progress: Progress) -> None:
        """Remove the folders of other steps: older ones, and one that a killed run had begun."""
        kept = {
            self._folder(step) for step in (progress.step, progress.best_step) if step is not None
        }
        for other in self.run.path.glob("step-*"):
            if other not in kept:
                shutil.rmtree(other, ignore_errors=True)


def _has_progress(folder: Path) -> bool:
    return os.path.lexists(folder / PROGRESS)


def _fitting(weights: Tensor, parameter: Tensor) -> Tensor:
    if weights.shape != parameter.shape:
        raise ValueError(f"weights of shape {tuple(weights.shape)}, not {tuple(parameter.shape)}")
    return spread_as(parameter, weights)
