"""The rows of a table, asked of a served model; every answer is logged as it comes."""

import contextlib
import logging
from collections.abc import Callable, Sequence

from hipp_ext.evals.prediction_log import PredictionLog
from hipp_ext.evals.served.vlm import Message, ServedVLM
from hipp_ext.files.untrusted import shown

_log = logging.getLogger(__name__)


def answer_each(
    model: ServedVLM,
    log: PredictionLog,
    indices: Sequence[str],
    message: Callable[[int], Message],
    *,
    progress: str | None,
    limit: int | None = None,
) -> None:
    """Ask a served model the rows that are not in the log, and log each answer as it comes.

    No answer depends on which questions are asked together, as far as the server keeps them apart,
    so the log is in the order in which the answers came.

    Args: as `predictions.answer_rows`.
    """
    from tqdm import tqdm

    needed = indices if limit is None else indices[:limit]
    rows = [row for row, index in enumerate(needed) if index not in log.answers]
    if len(rows) < len(needed):
        _log.warning(
            "%s: %d earlier answers are used again. If the server has other weights now, begin "
            "anew in another work folder.",
            shown(f"{model.name} at {model.base_url}"),
            len(needed) - len(rows),
        )
    if not rows:
        return
    with contextlib.closing(
        tqdm(
            total=len(needed),
            initial=len(needed) - len(rows),
            desc=progress,
            disable=progress is None,
        )
    ) as bar:

        def keep(number: int, answer: str) -> None:
            log.add([(indices[rows[number]], answer)])
            bar.update()

        model.ask(map(message, rows), keep)
