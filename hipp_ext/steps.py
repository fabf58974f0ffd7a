"""Steps of a long measurement, kept on disk while it runs.

A killed process leaves what it has finished, up to some seconds ago, for the next one that measures
the same. When the measurement is complete nothing is left.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hipp_ext.errors import CheckpointError, OutputBusyError
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import seal, text_digest, unseal
from hipp_ext.runs import RunFolder

EVERY = 5.0  # seconds between two writes
Shapes = Mapping[str, tuple[int, ...]]


class Steps:
    """Results of steps by name. `with Steps(...) as steps` removes them when the block succeeds.

    Where several processes measure the same, the first one keeps its steps, and the others read
    what it has kept.

    Args:
        folder: where measurements are kept, each in a folder of its own; None: nowhere.
        identity: all that the results depend on, in values that JSON can hold. Another identity is
            another measurement.
        log: called with a line when an interrupted measurement is resumed, and when nothing can be
            kept, which does not end the measurement.
    """

    def __init__(
        self,
        folder: Path | None = None,
        identity: Mapping[str, Any] | None = None,
        log: Callable[[str], None] | None = None,
    ):
        self._identity, self._log = dict(identity or {}), log or (lambda _: None)
        key = identity_key(self._identity)
        self._path = None if folder is None else folder / f"measuring-{key}"
        self._run: RunFolder | None = None
        self._owner = True
        self._pending: dict[str, Mapping[str, Tensor]] = {}
        self._written = time.monotonic()

    def __enter__(self) -> "Steps":
        if self._path is not None and self._path.is_dir():
            with self._unless_impossible():
                self._open()
        if self._run is not None and any(self._run.path.glob("*.safetensors")):
            self._log("resuming an interrupted measurement, which takes less than estimated")
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            self._write()
        elif self._run is not None and self._owner:
            shutil.rmtree(self._run.path, ignore_errors=True)
        if self._run is not None:
            self._run.close()

    def step(
        self, name: str, shapes: Shapes, make: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The result of a step: that of the interrupted measurement, else what `make` returns.

        Args:
            name: name of the step, which can be that of a file.
            shapes: names and shapes of its tensors, which are float32.
            make: carries out the step.
        """
        found = self.known(name)
        if not fits(found, shapes):
            found = dict(make())
            self.keep(name, found)
        return found

    def known(self, name: str) -> dict[str, Tensor]:
        """What an interrupted measurement left of a step; empty: nothing."""
        if self._run is None:
            return {}
        try:
            return unseal(self._run / f"{name}.safetensors")[0]
        except CheckpointError:  # missing, or damaged: measured again
            return {}

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the result of a step, or more of it than before; it is written within seconds."""
        if self._path is None:
            return
        self._pending[name] = tensors
        if time.monotonic() - self._written >= EVERY:
            self._write()

    def _write(self) -> None:
        with self._unless_impossible():
            if self._run is None and self._path is not None and self._pending:
                self._open()
            if self._run is not None and self._owner:
                for name, tensors in self._pending.items():
                    write_atomic(self._run / f"{name}.safetensors", seal(tensors))
        self._pending.clear()
        self._written = time.monotonic()

    def _open(self) -> None:
        assert self._path is not None
        try:
            self._run = RunFolder(self._path, self._identity)
        except OutputBusyError:
            self._run = RunFolder(self._path, self._identity, owner=False)
            self._path, self._owner = None, False
        except CheckpointError:  # a damaged folder
            shutil.rmtree(self._path, ignore_errors=True)
            self._run = RunFolder(self._path, self._identity)

    @contextlib.contextmanager
    def _unless_impossible(self) -> Iterator[None]:
        """Context in which nothing more is kept once something cannot be."""
        try:
            yield
        except (OSError, OutputBusyError, CheckpointError) as error:
            self._log(f"an interruption would lose what is measured: {error}")
            self._path = None


def identity_key(identity: Mapping[str, Any]) -> str:
    """A name for files about an identity: the beginning of its digest."""
    return text_digest(json.dumps(identity, sort_keys=True))[:32]


def fits(tensors: Mapping[str, Tensor], shapes: Shapes) -> bool:
    """Whether the tensors are finite, float32, and of these names and shapes."""
    return tensors.keys() == shapes.keys() and all(
        tensors[name].dtype == torch.float32
        and tuple(tensors[name].shape) == tuple(shape)
        and bool(tensors[name].isfinite().all())
        for name, shape in shapes.items()
    )


NOTHING_KEPT = Steps()
