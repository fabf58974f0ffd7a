"""Checkpoints of a run on several processes: a folder per step, and one small file that says which of them counts.

Each rank writes its own file, the first one the weights and the optimizer; when all are there the first one switches
progress.json, and only then is the older folder removed. Killed at any moment, the last switched step is whole.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from hipp_ext.comm import LQSGDState, load_state, save_state
from hipp_ext.errors import CheckpointError, DataError
from hipp_ext.files import new_file, write_atomic
from hipp_ext.files.sealed import seal, text_digest, unseal
from hipp_ext.files.untrusted import read_plain

PROGRESS, WEIGHTS, OPTIMIZER = "progress.json", "weights.safetensors", "optimizer.safetensors"


class Progress(BaseModel):
    """Contents of progress.json."""

    model_config = ConfigDict(extra="forbid")
    format: Literal[2] = 2
    run: str = Field(description="digest of settings, model and number of processes")
    step: int = Field(ge=1)
    losses: list[float]
    sha256: str = Field(default="", description="of all this without this field")

    def digest(self) -> str:
        """What `sha256` should say."""
        return text_digest(self.model_dump_json(exclude={"sha256"}))


class Checkpoints:
    """The checkpoints of one run in `folder`.

    Args:
        folder: of the run.
        run: what must be the same for a run to go on: plain types.
        rank, barrier: this process, and how it waits for the others.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], rank: int, barrier: Any):
        self.folder, self.rank, self.barrier = folder, rank, barrier
        self.run = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()

    def save(
        self,
        step: int,
        losses: list[float],
        model: nn.Module,
        optimizers: list[Any],
        state: LQSGDState | None,
    ) -> None:
        """All ranks call this after `step` steps."""
        folder = self.folder / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        if state is not None:
            save_state(state, self._own(folder))
        if self.rank == 0:
            _write(folder / WEIGHTS, {n: p.detach() for n, p in model.named_parameters()})
            _write(folder / OPTIMIZER, _optimizer_tensors(optimizers))
        self.barrier()
        if self.rank == 0:
            progress = Progress(run=self.run, step=step, losses=losses)
            progress.sha256 = progress.digest()
            write_atomic(self.folder / PROGRESS, progress.model_dump_json(indent=1) + "\n")
            self._sweep(folder)

    def _sweep(self, kept: Path) -> None:
        """Remove the folders of other steps: older ones, and one that a killed run had begun."""
        for other in self.folder.glob("step-*"):
            if other != kept:
                shutil.rmtree(other, ignore_errors=True)

    def load(
        self, model: nn.Module, optimizers: list[Any], state: LQSGDState | None
    ) -> tuple[int, list[float]]:
        """Put the last checkpoint into model, optimizers and state; returns its step (0 for none) and losses so far.

        Raises:
            CheckpointError: the folder is damaged, or belongs to a run with other settings.
        """
        file = self.folder / PROGRESS
        if not file.exists():
            return 0, []
        try:
            progress = Progress.model_validate_json(read_plain(file))
            if progress.sha256 != progress.digest():
                raise ValueError("it does not have the digest that it was written with")
        except (ValueError, DataError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise CheckpointError(
                f"{file} is damaged: {reason}. Remove {self.folder} to start over."
            ) from None
        if progress.run != self.run:
            raise CheckpointError(
                f"{self.folder} holds a run with other settings, another model or another number of processes. Repeat the "
                "command that began it, or remove the folder."
            )
        folder = self.folder / f"step-{progress.step}"
        try:
            weights, _ = unseal(folder / WEIGHTS)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(weights[name])
            _fill_optimizers(optimizers, folder / OPTIMIZER)
        except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder} is incomplete or damaged: {error!r}. Remove {self.folder} to start over."
            ) from error
        if state is not None:
            load_state(state, self._own(folder))
        if self.rank == 0:
            self._sweep(folder)
        return progress.step, progress.losses

    def _own(self, folder: Path) -> Path:
        return folder / f"lqsgd.rank{self.rank}.safetensors"


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with new_file(path) as file:
        file.write(seal(tensors))


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
