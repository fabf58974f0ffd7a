"""Answers of a model folder to the rows of a table: in batches, logged so that nothing is asked
twice.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from hipp_ext.evals.prediction_log import PredictionLog


def answer_rows(
    vlm: Callable[[], Any],
    log: PredictionLog,
    indices: Sequence[str],
    message: Callable[[int], list[dict]],
    *,
    batch_size: int,
    progress: str | None,
    limit: int | None = None,
) -> None:
    """Ask the model the rows that are not in the log, `batch_size` at a time, and log each batch.

    The rows of a batch can change an answer. So they depend only on the data and the batch size,
    and not on where a run was stopped or limited: the last batch below `limit` is asked whole.

    Args:
        vlm: returns the loaded model (`generate_batch`); called only if there is a row to ask.
        log: log of the answers; new ones are added.
        indices: index of each row, as text.
        message: returns the message of a row number.
        batch_size: number of rows per batch.
        progress: title of a progress bar on stderr; None for no bar.
        limit: number of rows that are needed; None for all.
    """
    from tqdm import tqdm

    needed = len(indices) if limit is None else min(limit, len(indices))
    rows = [row for row, index in enumerate(indices) if index not in log.answers]
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    batches = [batch for batch in batches if batch[0] < needed]
    if not batches:
        return
    model, new = vlm(), sum(map(len, batches))
    done = len(indices) - len(rows)
    with contextlib.closing(
        tqdm(total=done + new, initial=done, desc=progress, disable=progress is None)
    ) as bar:
        for batch in batches:
            answers = model.generate_batch([message(row) for row in batch])
            log.add(zip([indices[row] for row in batch], answers, strict=True))
            bar.update(len(batch))
