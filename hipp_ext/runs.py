"""A run that can be interrupted and resumed: a folder, and the identity of the run in it."""

import json
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hipp_ext.errors import CheckpointError, DataError, OutputBusyError
from hipp_ext.files import write_atomic
from hipp_ext.files.temporaries import lock, write_errors
from hipp_ext.files.untrusted import parse_json, read_plain, shown

IDENTITY = "run.json"
FORMAT = 1
MAX_BYTES = 64 << 20  # of the identity
MISSING = "(nothing)"

Same = Callable[[Any, Any], bool]  # (value in the folder, value asked for) -> whether they agree


class RunFolder:
    """The folder of one run. Made again with the same identity, the run goes on in it.

    The folder is locked until `close`, the end of a `with` block, or the end of the process, so
    that no two processes write the same run. `run / name` is the path of a file in it.

    Args:
        path: the folder; it is created if it does not exist.
        identity: all that must be equal for the run to go on, in values that JSON can hold:
            settings, digests of model and data, ...
        same: comparisons for top-level keys whose values may differ a little, such as measured
            scores.
        begun: function of the folder that says whether it holds results of the run; until then
            another identity replaces the one that is there. None: it holds some from the beginning.
        owner: False for processes that share the run of another one: they compare the identity
            if it is there, and neither write it nor lock the folder.

    Raises:
        CheckpointError: the folder holds a run with another identity, or is damaged.
        OutputBusyError: another process works in the folder.
        WriteError: the folder cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        identity: Mapping[str, Any],
        *,
        same: Mapping[str, Same] | None = None,
        begun: Callable[[Path], bool] | None = None,
        owner: bool = True,
    ):
        self.path = Path(path)
        asked = json.loads(json.dumps(identity))  # as JSON returns it: lists instead of tuples
        file = self.path / IDENTITY
        self.close: Callable[[], Any] = lambda: None
        if owner:
            folder = self.path.absolute()
            with write_errors(path, Path(folder.anchor)):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock()
        try:
            if os.path.lexists(file) and (begun is None or begun(self.path)):
                self._compare(self._read(file), asked, same or {})
            elif owner:
                content = {"format": FORMAT, "identity": asked}
                write_atomic(file, json.dumps(content, indent=1) + "\n")
        except BaseException:
            self.close()
            raise

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def is_there(self) -> bool:
        """Whether the identity of the run is in the folder."""
        return (self.path / IDENTITY).is_file()

    def damaged(self, reason: object) -> CheckpointError:
        """The error to raise if `reason` keeps the run from going on."""
        return CheckpointError(f"{self.path} is damaged: {reason}. Remove it to start again.")

    def _lock(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY)
        self.close = weakref.finalize(self, os.close, descriptor)
        if lock(descriptor, wait=False) is False:
            self.close()
            raise OutputBusyError(
                f"Another process works in {self.path}. Wait for it to end, or choose another "
                "folder."
            )

    def _read(self, file: Path) -> Any:
        try:
            content = parse_json(read_plain(file, MAX_BYTES), shown(file))
            if content["format"] != FORMAT:
                raise ValueError(f"{IDENTITY} has format {content['format']!r}, not {FORMAT}")
            return content["identity"]
        except (DataError, ValueError, KeyError, TypeError) as error:
            raise self.damaged(error) from None

    def _compare(self, found: Any, asked: Any, same: Mapping[str, Same]) -> None:
        if isinstance(found, dict):
            for key, agree in same.items():
                try:
                    if agree(found[key], asked[key]):
                        found[key] = asked[key]
                except (LookupError, TypeError, ValueError, AttributeError):
                    pass  # reported as a difference
        for name, there, now in _differences(found, asked, ""):
            raise CheckpointError(
                f"{self.path} holds another run: {name or 'the identity'} is {shown(there, 200)} "
                f"there, and {shown(now, 200)} was asked for. Repeat the command that began it, "
                "choose another folder, or remove this one."
            )


def _differences(found: Any, asked: Any, name: str) -> list[tuple[str, Any, Any]]:
    """(dotted name, value found, value asked for) of all that differs."""
    if isinstance(found, dict) and isinstance(asked, dict):
        return [
            difference
            for key in {**asked, **found}
            for difference in _differences(
                found.get(key, MISSING), asked.get(key, MISSING), f"{name}.{key}".lstrip(".")
            )
        ]
    return [] if found == asked else [(name, found, asked)]
