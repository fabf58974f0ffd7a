"""Checkpoints of a run on several processes: a folder per step, and progress.json that names one.

Each rank writes its own file, and the first one also the weights and the optimizers. When all
files are there, the first rank switches progress.json to the new step, and only then the older
folder is removed. So the step in progress.json is complete, whenever the run is killed.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from hipp_ext.comm import LQSGDState, load_state, save_state
from hipp_ext.comm.checkpoint import rank_file
from hipp_ext.errors import CheckpointError, DataError
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import seal, text_digest, unseal
from hipp_ext.files.untrusted import read_plain
from hipp_ext.runs import RunFolder

PROGRESS, WEIGHTS, OPTIMIZER = "progress.json", "weights.safetensors", "optimizer.safetensors"


class Progress(BaseModel):
    """Contents of progress.json."""

    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = 1
    step: int = Field(ge=1)
    losses: list[float]
    sha256: str = Field(default="", description="digest of the other fields")

    def digest(self) -> str:
        """The right value of `sha256`."""
        return text_digest(self.model_dump_json(exclude={"sha256"}))


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
            write_atomic(folder / OPTIMIZER, seal(_optimizer_tensors(optimizers)))
        self.barrier()
        if self.rank == 0:
            progress = Progress(step=step, losses=losses)
            progress.sha256 = progress.digest()
            write_atomic(self.run / PROGRESS, progress.model_dump_json(indent=1) + "\n")
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
        if (progress := self._progress()) is None:
            return 0, []
        folder = self.run / f"step-{progress.step}"
        try:
            weights, _ = unseal(folder / WEIGHTS)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(weights[name])
            _fill_optimizers(optimizers, folder / OPTIMIZER)
        except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder} is incomplete or damaged: {error!r}. Remove {self.run.path} to start "
                "over."
            ) from error
        if state is not None:
            load_state(state, rank_file(folder, self.rank))
        if self.rank == 0:
            self._sweep(folder)
        return progress.step, progress.losses

    def _progress(self) -> Progress | None:
        file = self.run / PROGRESS
        if not file.exists():
            return None
        try:
            progress = Progress.model_validate_json(read_plain(file))
            if progress.sha256 != progress.digest():
                raise ValueError("it does not have the digest that it was written with")
        except (ValueError, DataError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise CheckpointError(
                f"{file} is damaged: {reason}. Remove {self.run.path} to start over."
            ) from None
        return progress

    def _sweep(self, kept: Path) -> None:
        """Remove the folders of other steps: older ones, and one that a killed run had begun."""
        for other in self.run.path.glob("step-*"):
            if other != kept:
                shutil.rmtree(other, ignore_errors=True)


def _optimizer_tensors(optimizers: list[Any]) -> dict[str, Tensor]:
    return {
        f"{number}.{index}.{key}": torch.as_tensor(value)
        for number, optimizer in enumerate(optimizers)
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def _fill_optimizers(optimizers: list[Any], file: Path) -> None:
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, tensor in unseal(file)[0].items():
        number, index, key = name.split(".", 2)
        states[int(number)].setdefault(int(index), {})[key] = tensor
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(
            {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
        )
