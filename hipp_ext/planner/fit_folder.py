"""The folder of a fit: its identity, its checkpoint, and the plans that it measured."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hipp_ext.errors import CheckpointError
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import seal, unseal
from hipp_ext.planner.reward import scores_agree

CHECKPOINT, ARCHIVE, IDENTITY = "checkpoint.safetensors", "archive.jsonl", "fit.json"
MAX_IDENTITY_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a fit after a step.

    Attributes:
        step: number of finished rounds.
        finished: whether the final updates are done too.
        tensors: tensors of the learner.
    """

    step: int
    finished: bool
    tensors: Mapping[str, Tensor]


class FitFolder:
    """The files of a fit in `path`; None: nothing is kept."""

    def __init__(self, path: Path | None):
        self.path = path
        self.archive = None if path is None else path / ARCHIVE

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Use the folder for the fit with this identity.

        Args:
            identity: what must be the same to resume, as JSON. "dense", the evaluator's scores of
                the dense model, may differ a little, as they do on other hardware.

        Raises:
            CheckpointError: the folder holds another fit.
        """
        if self.path is None:
            return
        path, now = self.path / IDENTITY, json.loads(json.dumps(identity))  # without tuples
        if not path.exists():
            write_atomic(path, json.dumps(now) + "\n")
            return
        if not path.is_file() or path.stat().st_size > MAX_IDENTITY_BYTES:
            raise self.damaged(f"{IDENTITY} is no file of a fit.")
        try:
            there = json.loads(text := path.read_text(errors="replace"))
            same = there | {"dense": None} == now | {"dense": None} and scores_agree(
                there["dense"], now["dense"]
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            there, same = text.strip(), False
        if not same:
            raise CheckpointError(
                f"{self.path} holds a fit with other settings, of another model, with another "
                "evaluator or on other calibration. Choose another folder, or remove it.\n"
                f" there: {str(there)[:2000]}\n now:   {now}"
            )

    def save(self, checkpoint: Checkpoint) -> None:
        """Write `checkpoint` in place of the previous one."""
        if self.path is not None:
            progress = {"step": checkpoint.step, "finished": checkpoint.finished}
            write_atomic(self.path / CHECKPOINT, seal(checkpoint.tensors, progress))

    def load(self) -> Checkpoint | None:
        """The last checkpoint, or None if there is none.

        Raises:
            CheckpointError: it is damaged.
        """
        if self.path is None or not (path := self.path / CHECKPOINT).exists():
            return None
        try:
            tensors, progress = unseal(path)
            return Checkpoint(
                step=int(progress["step"]), finished=bool(progress["finished"]), tensors=tensors
            )
        except (KeyError, ValueError, TypeError) as error:
            raise self.damaged(f"{CHECKPOINT} is damaged: {error}") from None

    def damaged(self, what: str) -> CheckpointError:
        """The error for a folder that a fit cannot resume from."""
        return CheckpointError(f"{self.path}: {what} Remove the folder to start again.")
