"""Checkpoints of a run on several processes: a folder per step, and a file that names one.

Each rank writes its own file, and the first one also the weights and the optimizers. When all
files are there, the first rank switches progress.safetensors to the new step, and only then the
older folder is removed. So the step in this file is complete, whenever the run is killed.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hipp_ext.comm import LQSGDState, load_state, save_state
from hipp_ext.comm.checkpoint import rank_file
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import UNREADABLE, seal, unseal
from hipp_ext.runs import RunFolder
from hipp_ext.training import load_optimizers, optimizer_tensors

PROGRESS = "progress.safetensors"
WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: folder of the run.
        identity: what must be equal for the run to go on; see `RunFolder`.
        rank: number of this process.
        barrier: function that waits for the other processes.

    Raises:
        CheckpointError: the folder holds another run.
        OutputBusyError: another process works in the folder.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], rank: int, barrier: Any):
        self.rank, self.barrier = rank, barrier
        self.run = RunFolder(folder, identity, owner=rank == 0)

    def save(
        self,
        step: int,
        losses: list[float],
        model: nn.Module,
        optimizers: list[Any],
        state: LQSGDState | None,
    ) -> None:
        """Write the checkpoint after `step` steps. All ranks call this."""
        folder = self.run / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        if state is not None:
            save_state(state, rank_file(folder, self.rank))
        if self.rank == 0:
            write_atomic(folder / WEIGHTS, seal(dict(model.named_parameters())))
            write_atomic(folder / OPTIMIZER, seal(optimizer_tensors(optimizers)))
        self.barrier()
        if self.rank == 0:
            write_atomic(self.run / PROGRESS, seal({}, {"step": step, "losses": losses}))
            self._sweep(folder)

    def load(
        self, model: nn.Module, optimizers: list[Any], state: LQSGDState | None
    ) -> tuple[int, list[float]]:
        """Load the last checkpoint into model, optimizers and state.

        Returns:
            Its step (0 if there is no checkpoint), and the losses until then.

        Raises:
            CheckpointError: the checkpoint is damaged.
        """
        if not (self.run / PROGRESS).exists():
            return 0, []
        try:
            _, progress = unseal(self.run / PROGRESS)
            step, losses = int(progress["step"]), list(progress["losses"])
            folder = self.run / f"step-{step}"
            weights, _ = unseal(folder / WEIGHTS)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(weights[name])
            load_optimizers(optimizers, unseal(folder / OPTIMIZER)[0])
        except UNREADABLE as error:
            raise self.run.damaged(error) from error
        if state is not None:
            load_state(state, rank_file(folder, self.rank))
        if self.rank == 0:
            self._sweep(folder)
        return step, losses

    def _sweep(self, kept: Path) -> None:
        """Remove the folders of other steps: older ones, and one that a killed run had begun."""
        for other in self.run.path.glob("step-*"):
            if other != kept:
                shutil.rmtree(other, ignore_errors=True)
