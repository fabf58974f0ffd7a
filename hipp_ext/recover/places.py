"""Where in a batch a student is compared with its teacher."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hipp_ext.calibration import Batch
from hipp_ext.errors import CalibrationError, HippError
from hipp_ext.scorers.base import valid_tokens

Positions = Literal["answers", "text"]


@dataclass(frozen=True, kw_only=True)
class Places:
    """The positions of a batch at which next-token distributions are compared, row by row.

    Attributes:
        rows: row of each position, ascending; all tensors are on the CPU.
        columns: its column.
        next_ids: the token that follows, which the position predicts.
        answered: whether that token is a label.
        size: number of rows of the batch.
        positions: which positions count.
        image_token: id of the token that stands for pictures; None: there is none.
    """

    rows: Int[Tensor, " positions"]
    columns: Int[Tensor, " positions"]
    next_ids: Int[Tensor, " positions"]
    answered: Bool[Tensor, " positions"]
    size: int
    positions: Positions
    image_token: int | None

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, hidden: Float[Tensor, "rows tokens width"]) -> Float[Tensor, "positions width"]:
        """The hidden states at the positions."""
        return hidden[self.rows.to(hidden.device), self.columns.to(hidden.device)]

    @property
    def counts(self) -> list[int]:
        """Number of positions of each row."""
        return torch.bincount(self.rows, minlength=self.size).tolist()


def check_positions(positions: object) -> None:
    """Raise HippError unless `positions` is "answers" or "text"."""
    if positions not in get_args(Positions):
        raise HippError(f"positions={positions!r}: one of {', '.join(get_args(Positions))}.")


def find_places(batch: Batch, positions: Positions, image_token: int | None) -> Places:
    """The positions of `batch` that count; padding never does.

    Args:
        batch: inputs of the model's forward.
        positions: "answers": those that predict a label; "text": those that predict any token but
            one that stands for a picture.
        image_token: id of the token that stands for pictures; None: there is none.

    Raises:
        CalibrationError: no position counts.
    """
    ids, valid = batch["input_ids"].cpu(), valid_tokens(batch).cpu()
    pairs = valid[:, 1:] & valid[:, :-1]
    starts = batch.get("position_ids")
    if starts is not None and starts.shape == ids.shape:  # rows packed behind each other
        pairs &= starts.cpu()[:, 1:] != 0
    labels = batch["labels"].cpu() if "labels" in batch else torch.full_like(ids, -100)
    answered = pairs & (labels[:, 1:] != -100)
    text = pairs if image_token is None else pairs & (ids[:, 1:] != image_token)
    rows, columns = (answered if positions == "answers" else text).nonzero(as_tuple=True)
    if not len(rows):
        needed = "has no label that counts" if positions == "answers" else "has no text"
        raise CalibrationError(
            f"A batch of {len(ids)} rows {needed}, so there is nothing to learn from the teacher "
            f"(positions={positions!r}); it has {sorted(batch)}."
        )
    return Places(
        rows=rows,
        columns=columns,
        next_ids=ids[rows, columns + 1],
        answered=answered[rows, columns],
        size=len(ids),
        positions=positions,
        image_token=image_token,
    )
