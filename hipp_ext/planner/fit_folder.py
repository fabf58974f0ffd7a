"""The folder of a fit: which fit it is, how far it has come, and the plans that it measured."""

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
MOST = 1 << 20  # bytes of the last


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """How far a fit has come.

    Attributes:
        step: rounds that are done.
        finished: whether the final learning that follows the last of them is done too.
        tensors: of the learner.
    """

    step: int
    finished: bool
    tensors: Mapping[str, Tensor]


class FitFolder:
    """`path` of a fit, or None: then nothing is kept, and nothing was."""

    def __init__(self, path: Path | None):
        self.path = path
        self.archive = None if path is None else path / ARCHIVE

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Take the folder for the fit of this identity, which holds what the evaluator says of the dense model as "dense".

        Raises:
            CheckpointError: it is another fit's.
        """
        if self.path is None:
            return
        path, now = (
            self.path / IDENTITY,
            json.loads(json.dumps(identity)),
        )  # as JSON gives it back: without tuples
        if not path.exists():
            write_atomic(path, json.dumps(now) + "\n")
            return
        if not path.is_file() or path.stat().st_size > MOST:
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
                f"{self.path} holds a fit with other settings, of another model, with another evaluator or on other "
                f"calibration. Choose another folder, or remove it.\n there: {str(there)[:2000]}\n now:   {now}"
            )

    def save(self, checkpoint: Checkpoint) -> None:
        """Write `checkpoint` in place of the last one."""
        if self.path is not None:
            progress = {"step": checkpoint.step, "finished": checkpoint.finished}
            write_atomic(self.path / CHECKPOINT, seal(checkpoint.tensors, progress))

    def load(self) -> Checkpoint | None:
        """The last checkpoint; None: there is none.

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
        """The error to raise when `what` keeps the fit from going on."""
        return CheckpointError(f"{self.path}: {what} Remove the folder to start again.")
