"""The teacher of `hipp recover` and `hipp shrink`: its options, checked first, and loaded later."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipp_ext.cli.console import check_dtype, model_folder, require_model
from hipp_ext.errors import HippError


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """What was given about a teacher.

    Attributes:
        folder: folder of the dense model, or of what `precompute` wrote; None: there is no teacher.
        device, dtype: where the model runs, and the type of its parameters; None: not given.

    Raises:
        CheckpointError: the folder holds neither.
        HippError: the options do not fit together.
    """

    folder: Path | None
    device: str | None
    dtype: str | None

    def __post_init__(self) -> None:
        from hipp_ext.recover.cached_teacher import is_precomputed

        given = {"device": self.device, "dtype": self.dtype}
        named = [f"--teacher-{name}" for name, value in given.items() if value]
        check_dtype(self.dtype, "--teacher-dtype")
        if self.folder is None:
            if named:
                raise HippError(f"{named[0]} needs --teacher.")
        elif not is_precomputed(self.folder):
            require_model(str(self.folder))
        elif named:
            raise HippError(
                f"{named[0]} is for a dense model, and {self.folder} holds what one said: omit it."
            )

    def load(self, device: str | None) -> Any:
        """The teacher; None without one. It runs on `device` unless another was given."""
        if self.folder is None:
            return None
        from hipp_ext.recover import read_teacher
        from hipp_ext.surgery.checkpoint import resolve_device

        folder = model_folder(str(self.folder))
        place = resolve_device(self.device or device)
        return read_teacher(folder, device=place, dtype=self.dtype)
