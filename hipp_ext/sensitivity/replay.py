"""A calibration as the language tower sees it: inputs, positions that count, output head."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hipp_ext.calibration import TASKS, Batch, Calibration
from hipp_ext.calibration.records import spaced
from hipp_ext.errors import UnsupportedModelError
from hipp_ext.groups import check_loaded, decoder
from hipp_ext.output_head import OutputHead, fit_output_head, logit_bytes, tolerance
from hipp_ext.replay import decoder_inputs, whole_pass
from hipp_ext.scorers.base import valid_tokens
from hipp_ext.sensitivity.positions import counted_positions

# Inputs of a language tower and the dimension of their rows; None: rows share it.
ROW_DIMS = {
    "input_ids": 0,
    "inputs_embeds": 0,
    "attention_mask": 0,
    "position_ids": -2,
    "cache_position": None,
}
CHUNK_BYTES = 1 << 26  # of float32 logits that are in memory at once


@dataclass(frozen=True, kw_only=True, eq=False)
class ReplayBatch:
    """One batch of a calibration.

    Attributes:
        inputs: keyword arguments of the language tower.
        rows: row of each counted position, shape (positions,), on the CPU.
        places: place of each counted position in its row.
        size: number of rows.
        row_keys: hex digest of the tokens of each row, without its padding.
        tasks: for each of TASKS whether the batch belongs to it.
        batch: the calibration's batch, where the model may be run whole; else None.
    """

    inputs: Mapping[str, Any]
    rows: Int[Tensor, " positions"]
    places: Int[Tensor, " positions"]
    size: int
    row_keys: tuple[str, ...]
    tasks: Bool[Tensor, " tasks"]
    batch: Batch | None = None

    def last_hidden(
        self, model: nn.Module, whole: bool = False
    ) -> Float[Tensor, "rows tokens hidden"]:
        """The last hidden states; with `whole`, vision tower and projector run for them, too."""
        if whole:
            assert self.batch is not None, "the replay was made for the language tower alone"
            return whole_pass(model, self.batch)
        return decoder(model)(**self.inputs).last_hidden_state

    @property
    def divisible(self) -> bool:
        """Whether rows can be taken from the inputs: only if all of them are of a known shape.

        Pictures belong to rows in a way that only the model knows.
        """
        return self.batch is None and all(
            name in ROW_DIMS or not isinstance(value, Tensor | Mapping | Sequence)
            for name, value in self.inputs.items()
        )

    def take(self, chosen: Sequence[int]) -> "ReplayBatch":
        """The batch with some of its rows, which are given in ascending order."""
        index = torch.tensor(chosen)
        taken = torch.isin(self.rows, index)
        return dataclasses.replace(
            self,
            inputs={n: _rows_of(n, v, index, self.size) for n, v in self.inputs.items()},
            rows=torch.searchsorted(index, self.rows[taken]),
            places=self.places[taken],
            size=len(chosen),
            row_keys=tuple(self.row_keys[i] for i in chosen),
        )

    def counted(self, hidden: Float[Tensor, "rows tokens hidden"]) -> Float[Tensor, "P hidden"]:
        """The hidden states at the counted positions."""
        return hidden[self.rows.to(hidden.device), self.places.to(hidden.device)]

    def per_row(self, values: Float[Tensor, " positions"]) -> Float[Tensor, " rows"]:
        """Sum of the values of each row, on the CPU."""
        return torch.zeros(self.size).index_add_(0, self.rows, values.float().cpu())


class CalibrationReplay:
    """The batches of a calibration, ready to run through the language tower again and again.

    Embeddings, projector and vision tower run once. What is kept of a batch are the inputs of the
    language tower, and with `whole` also the batch itself.

    Args:
        model: model to be measured, in eval mode.
        calibration: checked batches.
        whole: whether the model may have to run whole, because units before the language tower are
            measured.

    Attributes:
        batches: the batches, in the calibration's order.
        head: how the model computes its logits.

    Raises:
        UnsupportedModelError: weights are offloaded, or the tower, called again, gives other logits
            than the model.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, calibration: Calibration, whole: bool = False):
        check_loaded(model)
        owners = [{id(batch) for batch in calibration.by_task[task]} for task in TASKS]
        self.batches = tuple(
            _replay_batch(model, batch, [id(batch) in own for own in owners], whole)
            for batch in calibration.batches
        )
        self.head = _verified_head(model, calibration.batches[0], self.batches[0])

    def sample(self, fraction: float) -> tuple[ReplayBatch, ...]:
        """Batches with a fraction of the rows of each task, evenly spaced, one row at least.

        Where batches cannot be taken apart it is a fraction of the batches.
        """
        divisible = all(batch.divisible for batch in self.batches)
        chosen: dict[int, set[int]] = {}
        for task in range(len(TASKS)):
            own = [
                (number, row)
                for number, batch in enumerate(self.batches)
                for row in range(batch.size if divisible else 1)
                if batch.tasks[task]
            ]
            for i in spaced(len(own), max(1, int(fraction * len(own)))):
                chosen.setdefault(own[i][0], set()).add(own[i][1])
        taken = [
            self.batches[n].take(sorted(rows)) if divisible else self.batches[n]
            for n, rows in sorted(chosen.items())
        ]
        return _joined(taken, max(batch.size for batch in self.batches)) if divisible else (*taken,)

    def by_task(
        self, values: Float[Tensor, "rows *rest"], batches: tuple[ReplayBatch, ...] | None = None
    ) -> Float[Tensor, "tasks *rest"]:
        """Mean over the counted positions of each task, of values that are sums over each row.

        Args:
            values: for the rows of all batches, one after the other.
            batches: the batches of the rows; None: all.
        """
        batches = self.batches if batches is None else batches
        sizes = torch.tensor([batch.size for batch in batches])
        own = torch.stack([batch.tasks for batch in batches]).repeat_interleave(sizes, 0)
        counts = torch.tensor([len(batch.rows) for batch in batches])
        positions = counts @ torch.stack([batch.tasks.long() for batch in batches])
        return torch.stack(
            [values[own[:, task]].sum(0) / int(positions[task]) for task in range(len(TASKS))]
        )


def _rows_of(name: str, value: Any, rows: Tensor, size: int) -> Any:
    """The part of an input that belongs to some rows."""
    dim = ROW_DIMS.get(name)
    if dim is None:
        return value

    def part(tensor: Tensor) -> Tensor:
        shared = tensor.shape[dim] != size
        return tensor if shared else tensor.index_select(dim, rows.to(tensor.device))

    # A tower whose layers have masks of several kinds (Gemma 3) is given a mapping of them.
    return tree_map_only(Tensor, part, value)


def _joined(batches: Sequence[ReplayBatch], limit: int) -> tuple[ReplayBatch, ...]:
    """The batches, those that follow each other as one if their rows are alike, up to `limit`."""
    found: list[ReplayBatch] = []
    for batch in batches:
        if found and found[-1].size + batch.size <= limit and (both := _join(found[-1], batch)):
            found[-1] = both
        else:
            found.append(batch)
    return tuple(found)


def _join(one: ReplayBatch, other: ReplayBatch) -> ReplayBatch | None:
    """The rows of both; None where their inputs differ in more than the rows."""
    if one.inputs.keys() != other.inputs.keys() or not torch.equal(one.tasks, other.tasks):
        return None
    inputs = {}
    for name, value in one.inputs.items():
        joined = _join_input(ROW_DIMS.get(name), value, other.inputs[name], one.size, other.size)
        if joined is _DIFFERENT:
            return None
        inputs[name] = joined
    return dataclasses.replace(
        one,
        inputs=inputs,
        rows=torch.cat([one.rows, other.rows + one.size]),
        places=torch.cat([one.places, other.places]),
        size=one.size + other.size,
        row_keys=one.row_keys + other.row_keys,
    )


_DIFFERENT = object()


def _join_input(dim: int | None, one: Any, other: Any, rows: int, other_rows: int) -> Any:
    """An input of both batches; _DIFFERENT where there is none."""
    if isinstance(one, Mapping) and isinstance(other, Mapping) and one.keys() == other.keys():
        joined = {k: _join_input(dim, one[k], other[k], rows, other_rows) for k in one}
        return _DIFFERENT if any(v is _DIFFERENT for v in joined.values()) else joined
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one if type(one) is type(other) and one == other else _DIFFERENT
    if dim is not None and (one.shape[dim], other.shape[dim]) == (rows, other_rows):
        shapes = [list(value.shape) for value in (one, other)]
        for shape in shapes:
            del shape[dim]
        return torch.cat([one, other], dim) if shapes[0] == shapes[1] else _DIFFERENT
    return one if one.shape == other.shape and torch.equal(one, other) else _DIFFERENT


def chunks(model: nn.Module, hidden: Float[Tensor, "P hidden"]) -> Iterator[Tensor]:
    """The hidden states in parts whose logits take at most CHUNK_BYTES."""
    yield from hidden.split(max(1, CHUNK_BYTES // logit_bytes(model)))


def _replay_batch(model: nn.Module, batch: Batch, tasks: list[bool], whole: bool) -> ReplayBatch:
    rows, places = counted_positions(model, batch).nonzero(as_tuple=True)
    tokens = zip(batch["input_ids"].cpu(), valid_tokens(batch).cpu(), strict=True)
    return ReplayBatch(
        inputs=decoder_inputs(model, batch),
        rows=rows,
        places=places,
        size=len(batch["input_ids"]),
        row_keys=tuple(
            hashlib.sha256(ids[valid].numpy().tobytes()).hexdigest() for ids, valid in tokens
        ),
        tasks=torch.tensor(tasks),
        batch=batch if whole else None,
    )


def _verified_head(model: nn.Module, batch: Batch, replay: ReplayBatch) -> OutputHead:
    """The model's head, found on the last counted position of each row of a batch."""
    last = replay.places[replay.rows.bincount().cumsum(0) - 1]
    head, expected = fit_output_head(model, batch, last)
    hidden = decoder(model)(**replay.inputs).last_hidden_state
    again = head(model, hidden[torch.arange(replay.size), last.to(hidden.device)]).cpu()
    if not float((again - expected).abs().max()) <= tolerance(model, expected, roundings=16):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its language tower, called again with the same inputs, "
            "returns other logits than the model, so its sensitivity cannot be measured."
        )
    return head
