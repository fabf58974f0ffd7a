"""What a teacher says about every row of the data, written to disk once, for `CachedTeacher`."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hipp_ext.calibration import Batch, batches_digest
from hipp_ext.errors import CalibrationError, HippError
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import UNREADABLE, seal, unseal
from hipp_ext.output_head import check_no_nan, logit_bytes
from hipp_ext.progress import progress_bar
from hipp_ext.quantities import finite_option, whole_option
from hipp_ext.recover.cached_teacher import CachedTeacher, is_precomputed
from hipp_ext.recover.divergence import TopK
from hipp_ext.recover.places import Places, Positions, check_positions, find_places
from hipp_ext.recover.row_keys import row_keys
from hipp_ext.recover.teacher_files import HEADER, TYPES, Header, bytes_per_position, shard_name
from hipp_ext.recover.teachers import ModelTeacher
from hipp_ext.runs import RunFolder

SHARD_POSITIONS = 1 << 14  # about 6 MB for 64 tokens; a killed run loses the work of a part of one
LOGIT_BYTES = 1 << 28  # float32 logits that are in memory at once


@runtime_checkable
class RowSource(Protocol):
    """Rows of data, each once, in an order that does not change; `len` is the number of steps.

    Attributes:
        identity: what must be equal for two sources to give the same rows, as JSON values.
    """

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def __len__(self) -> int: ...

    def once(self, start: int) -> Iterator[list[Batch]]:
        """For each step from `start` on, its batches; there may be none."""
        ...


class BatchRows:
    """The rows of batches that are in memory, as a `RowSource`."""

    def __init__(self, batches: Sequence[Batch]):
        self.batches = batches
        self.identity = {"batches": batches_digest(batches)}

    def __len__(self) -> int:
        return len(self.batches)

    def once(self, start: int) -> Iterator[list[Batch]]:
        """See `RowSource.once`: a step for each batch."""
        return ([batch] for batch in self.batches[start:])


def precompute(
    model: nn.Module,
    data: RowSource | Sequence[Batch],
    folder: str | Path,
    *,
    top_k: int = 64,
    temperature: float = 1.0,
    positions: Positions = "answers",
    processor: Any = None,
    shard_positions: int = SHARD_POSITIONS,
    progress: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> CachedTeacher:
    """The teacher in `folder`: the k most likely tokens at every counted position of the data.

    An interrupted run goes on after its last complete shard: the same call ends with the files of
    an undisturbed run, byte for byte. A complete folder is returned as it is.

    A position takes 6 k + 4 bytes: 388 for k = 64. `log` is told the size of the whole after the
    first step, estimated from its positions.

    Args:
        model: the dense model, which is put into eval mode and frozen.
        data: a source of rows, or batches of inputs of the model's forward, with labels where
            `positions` is "answers". Training may put the rows into other batches, in any order.
        folder: folder for the shards.
        top_k: tokens that are kept for each position.
        temperature: temperature of the probabilities, which training has to use, too.
        positions: see `Distillation`.
        processor: processor or tokenizer of the model; None: the one beside its weights.
        shard_positions: positions after which a shard ends, with the step that reaches them.
        progress: show a progress bar.
        log: callback with a line of progress.

    Raises:
        CheckpointError: `folder` holds the work of another model, other data or other settings, or
            is damaged.
        OutputBusyError: another process works in `folder`.
        CalibrationError: there are no rows, or a batch has no position that counts.
        UnsupportedModelError: the model's logits cannot be computed from its hidden states.
        HippError: a setting is out of range.
    """
    check_positions(positions)
    top_k = whole_option("top_k", top_k, HippError, 1)
    temperature = finite_option("temperature", temperature, HippError)
    shard_positions = whole_option("shard_positions", shard_positions, HippError, 1)
    source: Any = data if hasattr(data, "once") else BatchRows(list(data))  # type: ignore[arg-type]
    if not len(source):
        raise CalibrationError("The data has no rows: there is nothing to precompute.")
    teacher = ModelTeacher(model, processor=processor)
    top_k = min(top_k, teacher.vocabulary.size)
    settings = {"top_k": top_k, "temperature": temperature, "positions": positions}
    identity = {
        **settings,
        "shard_positions": shard_positions,
        **teacher.identity,
        "vocabulary": teacher.vocabulary.digest,
        "data": dict(source.identity),
    }
    with RunFolder(folder, identity, begun=is_precomputed) as run:
        if (run / HEADER).exists():
            return CachedTeacher(folder)
        state = _Written.of(run)
        with progress_bar(progress, "precomputing", len(source), state.steps) as show:
            for batches in source.once(state.steps):
                for batch in batches:
                    places = find_places(batch, positions, teacher.vocabulary.image_token)
                    state.add(batch, places, _top(teacher, batch, places, top_k, temperature))
                state.steps += 1
                if state.steps == 1:
                    log(_estimate(state.places, top_k, len(source), run.path))
                if state.waiting >= shard_positions:
                    state.write(run)
                show(state.steps, f"{state.rows:,} rows")
        if not state.rows:
            raise CalibrationError("No row of the data can be used.")
        if state.waiting:
            state.write(run)
        header = Header(
            **settings,  # type: ignore[arg-type]
            shards=state.shards,
            rows=state.rows,
            places=state.places,
            **teacher.identity,
            vocabulary=teacher.vocabulary,
        )
        write_atomic(run / HEADER, header.model_dump_json())
        return CachedTeacher(folder)


class _Written:
    """What a run has written, and what waits for the next shard.

    Attributes:
        shards: number of shards on disk.
        steps, rows, places: numbers of them that are done, on disk or waiting.
        waiting: number of positions that wait.
    """

    def __init__(self, shards: int = 0, steps: int = 0, rows: int = 0, places: int = 0):
        self.shards, self.steps, self.rows, self.places = shards, steps, rows, places
        self.waiting = 0
        self._parts: list[dict[str, Tensor]] = []

    @classmethod
    def of(cls, run: RunFolder) -> "_Written":
        """What is in the folder of a run."""
        shards = 0
        while (run / shard_name(shards)).exists():
            shards += 1
        if not shards:
            return cls()
        try:
            about = unseal(run / shard_name(shards - 1))[1]
            return cls(shards, *(int(about[name]) for name in ("steps", "rows", "places")))
        except UNREADABLE as error:
            raise run.damaged(error) from error

    def add(self, batch: Batch, places: Places, top: TopK) -> None:
        """Add the rows of a batch."""
        keys = [list(bytes.fromhex(key)) for key in row_keys(batch, places)]
        self._parts.append(
            {
                "keys": torch.tensor(keys, dtype=TYPES["keys"]),
                "offsets": torch.tensor(places.counts),
                "indices": top.indices.to(TYPES["indices"]),
                # Rounded sums may leave the logarithm of 1 a little above 0.
                "log_p": top.log_p.clamp(max=0).to(TYPES["log_p"]),
                "log_rest": top.log_rest.clamp(max=0),
            }
        )
        self.rows += places.size
        self.places += len(places)
        self.waiting += len(places)

    def write(self, run: RunFolder) -> None:
        """Write what waits as the next shard."""
        tensors = {name: torch.cat([part[name] for part in self._parts]) for name in TYPES}
        tensors["offsets"] = nn.functional.pad(tensors["offsets"].cumsum(0), (1, 0))
        about = {"steps": self.steps, "rows": self.rows, "places": self.places}
        write_atomic(run / shard_name(self.shards), seal(tensors, about))
        self.shards, self.waiting, self._parts = self.shards + 1, 0, []


def _top(
    teacher: ModelTeacher, batch: Batch, places: Places, top_k: int, temperature: float
) -> TopK:
    """The k most likely tokens at all places, on the CPU; logits are computed by chunks."""
    targets = teacher.targets(batch, places, temperature=temperature, top_k=top_k)
    chunk = max(1, LOGIT_BYTES // logit_bytes(teacher.model))
    parts: list[Any] = [
        targets.distribution(slice(start, start + chunk), torch.device("cpu"))
        for start in range(0, len(places), chunk)
    ]
    top = TopK(**{n: torch.cat([getattr(p, n) for p in parts]) for n in vars(parts[0])})
    check_no_nan(teacher.model, top.log_p)
    return top


def _estimate(places: int, top_k: int, steps: int, folder: Path) -> str:
    each = bytes_per_position(top_k)
    total, free = each * places * steps, shutil.disk_usage(folder).free
    return (
        f"{each} bytes per position, {places:,} positions in the first of {steps:,} steps: about "
        f"{total / 1e9:,.3f} GB in {folder}, where {free / 1e9:,.1f} GB are free"
    )
