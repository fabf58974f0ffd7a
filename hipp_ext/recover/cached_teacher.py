"""What a teacher said once, read from disk; no model is in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hipp_ext.calibration import Batch
from hipp_ext.errors import CheckpointError, HippError
from hipp_ext.recover.divergence import Distribution, TopK
from hipp_ext.recover.places import Places, Positions
from hipp_ext.recover.row_keys import row_keys
from hipp_ext.recover.teacher_files import HEADER, TeacherFiles, shard_name
from hipp_ext.recover.vocabulary import Vocabulary


class CachedTeacher:
    """The teacher in a folder that `precompute` wrote.

    Args:
        folder: the folder.

    Attributes:
        header: what is in the folder: `top_k`, `temperature`, `positions`, ...
        vocabulary, layers, identity: see `Teacher`; there are no hidden states.

    Raises:
        CheckpointError: the folder is not complete, or is damaged.
    """

    layers = 0

    def __init__(self, folder: str | Path):
        self._files = TeacherFiles(Path(folder))
        self.header = self._files.header
        self.vocabulary: Vocabulary = self.header.vocabulary
        named = {"model", "top_k", "temperature", "positions"}
        self.identity: Mapping[str, Any] = self.header.model_dump(include=named)
        # Of equal rows the first one counts.
        self._rows = {key: span for key, span in reversed(list(self._files.rows()))}

    def check(self, *, temperature: float, positions: Positions, top_k: int | None) -> None:
        """See `Teacher.check`.

        Raises:
            HippError: the folder was made with other settings.
        """
        for name, asked in (("temperature", temperature), ("positions", positions)):
            if (own := getattr(self.header, name)) != asked:
                raise HippError(
                    f"{name}={asked!r}: {self._files.folder} was precomputed with {name}={own!r}. "
                    "Ask for that, or precompute again."
                )
        if top_k is not None and top_k > self.header.top_k:
            raise HippError(
                f"top_k={top_k}: {self._files.folder} keeps {self.header.top_k} tokens of each "
                "position."
            )

    def targets(
        self,
        batch: Batch,
        places: Places,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        layers: Sequence[int] = (),
    ) -> "CachedTargets":
        """See `Teacher.targets`.

        Raises:
            HippError: as `check`.
            CalibrationError: it is not known which pictures belong to which row.
            CheckpointError: a row is not in the folder, or a shard is damaged.
        """
        self.check(temperature=temperature, positions=places.positions, top_k=top_k)
        assert not layers, "Distillation asks a teacher without layers for none"
        found = [
            self._row(_named(batch, row), bytes.fromhex(key), count)
            for row, (key, count) in enumerate(
                zip(row_keys(batch, places), places.counts, strict=True)
            )
            if count
        ]
        top = TopK(
            **{name: torch.cat([getattr(t, name) for t in found]) for name in vars(found[0])}
        )
        top = top.normalised()
        return CachedTargets(top=top if top_k is None else top.first(top_k))

    def _row(self, name: str, key: bytes, count: int) -> TopK:
        """The distributions of a row with `count` positions."""
        span = self._rows.get(key)
        if span is None:
            raise CheckpointError(
                f"{name} is not among the {self.header.rows:,} rows of {self._files.folder}. "
                "Precompute with the same data, sequence length and processor as in training; "
                "packed rows are never there."
            )
        if span.last - span.first != count:
            raise self._files.damaged(
                shard_name(span.shard), f"a row of {count} positions has others"
            )
        return self._files.read(span)


@dataclass(frozen=True, kw_only=True)
class CachedTargets:
    """Distributions that were read from disk."""

    top: TopK
    states: Mapping[int, Float[Tensor, "positions width"]] = field(default_factory=dict)

    def distribution(self, part: slice, device: torch.device) -> Distribution:
        """See `Targets.distribution`."""
        return TopK(**{name: value[part].to(device) for name, value in vars(self.top).items()})


def _named(batch: Batch, row: int) -> str:
    """What a message calls a row of a batch: by its number in the file, where that is known."""
    rows = getattr(batch, "rows", ())
    if rows and len(rows) == len(batch["input_ids"]):
        return f"Row {rows[row]} of the data"
    return f"Packed row {row + 1}" if rows else f"Row {row + 1} of a batch"


def is_precomputed(path: str | Path) -> bool:
    """Whether `precompute` began to write a folder there, or completed one."""
    return (Path(path) / HEADER).exists() or (Path(path) / shard_name(0)).exists()


def read_teacher(
    path: str | Path, *, device: str | None = None, dtype: torch.dtype | str | None = None
) -> Any:
    """The teacher at `path`: what was precomputed there, or the model of a model folder.

    Args:
        path: a folder.
        device, dtype: of the model; see `load_pruned`.

    Raises:
        CheckpointError: it is neither, is not complete or is damaged.
    """
    if is_precomputed(path):
        return CachedTeacher(path)
    from hipp_ext.recover.teachers import ModelTeacher
    from hipp_ext.surgery.checkpoint import load_pruned

    return ModelTeacher(load_pruned(path, device=device, dtype=dtype))
