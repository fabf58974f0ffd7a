"""The files of a folder that holds what a teacher said: its k most likely tokens at every position.

`teacher.json` is written last. A shard is a sealed safetensors file of rows, one after the other:

    keys      (rows, 16) uint8          `row_keys`
    offsets   (rows + 1) int64          positions of row i: offsets[i] to offsets[i + 1]
    indices   (positions, k) int32      ids of the most likely tokens
    log_p     (positions, k) float16    their log-probabilities
    log_rest  (positions) float32       log of the probability of all other tokens
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from hipp_ext.errors import CheckpointError, DataError
from hipp_ext.files.sealed import UNREADABLE, unseal
from hipp_ext.files.untrusted import read_plain
from hipp_ext.recover.divergence import TopK
from hipp_ext.recover.places import Positions
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
        model: digest of the model.
        vocabulary: the model's.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    format: int = Field(default=1, ge=1, le=1)
    top_k: int = Field(ge=1)
    temperature: float = Field(gt=0, allow_inf_nan=False)
    positions: Positions
    shards: int = Field(ge=1)
    rows: int = Field(ge=1)
    places: int = Field(ge=1)
    model: str
    vocabulary: Vocabulary


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:06d}.safetensors"


def bytes_per_position(top_k: int) -> int:
    """Bytes of a position on disk."""
    return top_k * (TYPES["indices"].itemsize + TYPES["log_p"].itemsize) + 4


class TeacherFiles:
    """The complete folder at `folder`, read only. A shard is checked when it is first read.

    Attributes:
        header: `teacher.json`.

    Raises:
        CheckpointError: the folder is not complete, or is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / HEADER).is_file():
            raise CheckpointError(
                f"{folder} holds no complete {HEADER}: it was not written by `hipp recover "
                "precompute`, or that was interrupted. Run the command again to complete it."
            )
        try:
            self.header = Header.model_validate_json(read_plain(folder / HEADER))
        except (ValidationError, DataError, RecursionError) as error:
            raise self.damaged(HEADER, error) from None
        self._checked = set[int]()

    def rows(self) -> Iterator[tuple[bytes, "Span"]]:
        """The key of every row, and where its positions are. Shapes are checked."""
        for number in range(self.header.shards):
            name, k = shard_name(number), self.header.top_k
            try:
                with safetensors.safe_open(self._file(name), "pt") as file:
                    keys, offsets = file.get_tensor("keys"), file.get_tensor("offsets")
                    shapes = {n: tuple(file.get_slice(n).get_shape()) for n in TYPES}
                if (keys.dtype, offsets.dtype) != (TYPES["keys"], TYPES["offsets"]):
                    raise ValueError(f"keys are {keys.dtype}, offsets {offsets.dtype}")
                bounds = offsets.tolist() or [0]
                expected = {
                    "keys": (len(keys), KEY_BYTES),
                    "offsets": (len(keys) + 1,),
                    "indices": (bounds[-1], k),
                    "log_p": (bounds[-1], k),
                    "log_rest": (bounds[-1],),
                }
                if shapes != expected or bounds[0] != 0 or bounds != sorted(bounds):
                    raise ValueError(f"shapes are {shapes}, not {expected}")
            except UNREADABLE as error:
                raise self.damaged(name, error) from None
            for key, first, last in zip(keys, bounds[:-1], bounds[1:], strict=True):
                yield key.numpy().tobytes(), Span(shard=number, first=first, last=last)

    def read(self, span: "Span") -> TopK:
        """The distributions at the positions of a row.

        Raises:
            CheckpointError: the shard is damaged.
        """
        file = self._file(shard_name(span.shard))
        if span.shard not in self._checked:
            self._check_contents(span.shard, unseal(file)[0])
            self._checked.add(span.shard)
        with safetensors.safe_open(file, "pt") as opened:
            indices, log_p, log_rest = (
                opened.get_slice(name)[span.first : span.last]
                for name in ("indices", "log_p", "log_rest")
            )
        return TopK(indices=indices.long(), log_p=log_p.float(), log_rest=log_rest)

    def damaged(self, name: str, reason: object) -> CheckpointError:
        """The error to raise if `reason` keeps a file from being read."""
        line = " ".join(str(reason).split())
        return CheckpointError(
            f"{self.folder / name} is damaged: {line}. Remove the folder, and precompute again."
        )

    def _check_contents(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        types = {name: tensors[name].dtype for name in TYPES}
        indices, log_p, log_rest = (tensors[name] for name in ("indices", "log_p", "log_rest"))
        known = (indices >= 0) & (indices < self.header.vocabulary.size)
        # In float32 first: where training runs in bfloat16, autocast refuses to join halves.
        total = torch.cat([log_p.float(), log_rest.float()[:, None]], -1).logsumexp(-1)
        if types != TYPES or not bool(known.all()) or not bool((total.abs() < ROUNDING).all()):
            raise self.damaged(
                shard_name(number), "its values are no ids and probabilities that add up to 1"
            )

    def _file(self, name: str) -> Path:
        file = self.folder / name
        if not file.is_file():
            raise self.damaged(name, "it is missing, or no file")
        return file


@dataclass(frozen=True, kw_only=True)
class Span:
    """The positions of a row: those from `first` to before `last` of a shard."""

    shard: int
    first: int
    last: int
