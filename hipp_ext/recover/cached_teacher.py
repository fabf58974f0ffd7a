"""What a teacher said once, read from disk: its k most likely tokens at every position.

A folder holds `teacher.json`, which is written last, and shards. A shard is a sealed safetensors
file of rows one after the other:

    keys      (rows, 16) uint8          `row_keys`
    offsets   (rows + 1) int64          positions of row i: offsets[i] to offsets[i + 1]
    indices   (positions, k) int32      ids of the most likely tokens
    log_p     (positions, k) float16    their log-probabilities
    log_rest  (positions) float32       log of the probability of all other tokens
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from hipp_ext.calibration import Batch
from hipp_ext.errors import CheckpointError, DataError, HippError
from hipp_ext.files.sealed import UNREADABLE, unseal
from hipp_ext.files.untrusted import read_plain
from hipp_ext.recover.divergence import Distribution, TopK
from hipp_ext.recover.places import Places, Positions, row_keys
from hipp_ext.recover.vocabulary import Vocabulary

HEADER = "teacher.json"
KEY_BYTES = 16
ROUNDING = 0.05  # most that rounding changes the logarithm of the sum of the probabilities
TYPES = {
    "keys": torch.uint8,
    "offsets": torch.int64,
    "indices": torch.int32,
    "log_p": torch.float16,
    "log_rest": torch.float32,
}


class Header(BaseModel):
    """`teacher.json`.

    Attributes:
        format: version of the format.
        top_k: number of tokens at each position.
        temperature: temperature of the probabilities.
        positions: which positions of a row are there; see `find_places`.
        shards: number of shards.
        rows, places: number of rows and of positions in all shards.
        vocabulary: the teacher's.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    format: int = Field(default=1, ge=1, le=1)
    top_k: int = Field(ge=1)
    temperature: float = Field(gt=0, allow_inf_nan=False)
    positions: Positions
    shards: int = Field(ge=1)
    rows: int = Field(ge=1)
    places: int = Field(ge=1)
    vocabulary: Vocabulary


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:06d}.safetensors"


def bytes_per_position(top_k: int) -> int:
    """Bytes of a position on disk."""
    return top_k * (TYPES["indices"].itemsize + TYPES["log_p"].itemsize) + 4


class CachedTeacher:
    """The teacher in a folder that `precompute` wrote. No model is in memory.

    A shard is checked against its digest when a row of it is first read.

    Args:
        folder: the folder.

    Attributes:
        vocabulary, layers: see `Teacher`; there are no hidden states.
        header: what is in the folder.

    Raises:
        CheckpointError: the folder is not complete, or is damaged.
    """

    layers = 0

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / HEADER).is_file():
            raise CheckpointError(
                f"{self.folder} holds no complete {HEADER}: it was not written by `hipp recover "
                "precompute`, or that was interrupted. Run the command again to complete it."
            )
        try:
            self.header = Header.model_validate_json(read_plain(self.folder / HEADER))
        except (ValidationError, DataError, RecursionError) as error:
            raise self._damaged(HEADER, error) from None
        self._checked = set[int]()
        self._rows: dict[bytes, tuple[int, int, int]] = {}  # key -> shard, first, last
        for number in range(self.header.shards):
            self._index(number)

    @property
    def vocabulary(self) -> Vocabulary:
        """See `Teacher`."""
        return self.header.vocabulary

    def check(self, *, temperature: float, positions: Positions, top_k: int | None) -> None:
        """See `Teacher.check`.

        Raises:
            HippError: the folder was made with other settings.
        """
        for name, asked in (("temperature", temperature), ("positions", positions)):
            if (own := getattr(self.header, name)) != asked:
                raise HippError(
                    f"{name}={asked!r}: {self.folder} was precomputed with {name}={own!r}. Ask for "
                    "that, or precompute again."
                )
        if top_k is not None and top_k > self.header.top_k:
            raise HippError(
                f"top_k={top_k}: {self.folder} keeps {self.header.top_k} tokens of each position."
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
        parts = []
        for row, key in enumerate(row_keys(batch, places)):
            if not places.counts[row]:
                continue
            found = self._rows.get(bytes.fromhex(key))
            if found is None:
                raise CheckpointError(
                    f"Row {row} of a batch of {places.size} is not among the "
                    f"{self.header.rows:,} rows of {self.folder}: precompute with the same data, "
                    "sequence length and processor as in training."
                )
            number, first, last = found
            if last - first != places.counts[row]:
                raise self._damaged(
                    shard_name(number), f"a row of {places.counts[row]} positions has others"
                )
            parts.append(self._read(number, first, last))
        joined = TopK(**{name: torch.cat([p[name] for p in parts]) for name in parts[0]})
        joined = joined.normalised()
        return CachedTargets(top=joined if top_k is None else joined.first(top_k))

    def _index(self, number: int) -> None:
        """Add the rows of a shard, whose shapes are checked."""
        name = shard_name(number)
        try:
            with safetensors.safe_open(self._file(name), "pt") as file:
                keys, offsets = file.get_tensor("keys"), file.get_tensor("offsets")
                shapes = {n: tuple(file.get_slice(n).get_shape()) for n in TYPES}
            if (keys.dtype, offsets.dtype) != (TYPES["keys"], TYPES["offsets"]):
                raise ValueError(f"keys are {keys.dtype}, offsets {offsets.dtype}")
            bounds = offsets.tolist() or [0]
            positions, k = bounds[-1], self.header.top_k
            expected = {
                "keys": (len(keys), KEY_BYTES),
                "offsets": (len(keys) + 1,),
                "indices": (positions, k),
                "log_p": (positions, k),
                "log_rest": (positions,),
            }
            if shapes != expected or bounds[0] != 0 or bounds != sorted(bounds):
                raise ValueError(f"shapes are {shapes}, not {expected}")
        except UNREADABLE as error:
            raise self._damaged(name, error) from None
        for key, first, last in zip(keys, bounds[:-1], bounds[1:], strict=True):
            self._rows.setdefault(key.numpy().tobytes(), (number, first, last))

    def _read(self, number: int, first: int, last: int) -> dict[str, Tensor]:
        """The tensors of `TopK` at some positions of a shard."""
        file = self._file(shard_name(number))
        if number not in self._checked:
            self._check_contents(number, unseal(file)[0])
            self._checked.add(number)
        with safetensors.safe_open(file, "pt") as opened:
            read = {name: opened.get_slice(name)[first:last] for name in list(TYPES)[2:]}
        return {
            "indices": read["indices"].long(),
            "log_p": read["log_p"].float(),
            "log_rest": read["log_rest"],
        }

    def _check_contents(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        types = {name: tensors[name].dtype for name in TYPES}
        indices, log_p, log_rest = (tensors[name] for name in list(TYPES)[2:])
        known = (indices >= 0) & (indices < self.vocabulary.size)
        total = torch.cat([log_p, log_rest[:, None]], -1).float().logsumexp(-1)
        if types != TYPES or not bool(known.all()) or not bool((total.abs() < ROUNDING).all()):
            raise self._damaged(
                shard_name(number), "its values are no ids and probabilities that add up to 1"
            )

    def _file(self, name: str) -> Path:
        file = self.folder / name
        if not file.is_file():
            raise self._damaged(name, "it is missing, or no file")
        return file

    def _damaged(self, name: str, reason: object) -> CheckpointError:
        line = " ".join(str(reason).split())
        return CheckpointError(
            f"{self.folder / name} is damaged: {line}. Remove the folder, and precompute again."
        )


@dataclass(frozen=True, kw_only=True)
class CachedTargets:
    """Distributions that were read from disk."""

    top: TopK
    states: Mapping[int, Float[Tensor, "positions width"]] = field(default_factory=dict)

    def distribution(self, part: slice, device: torch.device) -> Distribution:
        """See `Targets.distribution`."""
        return TopK(**{name: value[part].to(device) for name, value in vars(self.top).items()})


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
