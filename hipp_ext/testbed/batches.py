"""Calibration batches of the testbed: pictures and questions through any vision-language processor."""

from typing import Any

from hipp_ext.calibration import Batch, encode
from hipp_ext.errors import CalibrationError
from hipp_ext.testbed.quiz import Question, choice_stream, pope_groups


def calibration_batches(
    processor: Any, n: int = 64, batch_size: int = 16, split: str = "calibration", with_labels: bool = True
) -> list[Batch]:
    """A list of batches for `model(**batch)`: POPE and ScienceQA questions in turn, `n` rows in all.

    Every POPE row has its own picture; "yes" and "no" take turns, and so do the three kinds of absent object.

    Args:
        processor: of the model, as `load` returns it, or of another vision-language model with a chat template.
        n, batch_size: rows in all and per batch.
        split: where the questions come from; "calibration" keeps the others unseen.
        with_labels: end each row with the answer, and add labels: -100 but for the answer.

    Returns:
        Dicts of input_ids, attention_mask [batch, tokens] int64, pixel_values, and labels.

    Raises:
        CalibrationError: `n` or `batch_size` is below 1.
    """
    if n < 1 or batch_size < 1:
        raise CalibrationError(f"calibration_batches needs n >= 1 and batch_size >= 1, got n={n}, {batch_size=}.")
    rows: list[Question] = []
    for number, (group, choice) in enumerate(zip(pope_groups(split), choice_stream(split), strict=False)):
        if len(rows) >= n:
            break
        kind = ("random", "popular", "adversarial")[number // 2 % 3]
        wanted = "No" if number % 2 else "Yes"
        rows += [next(q for q in group if q.answer == wanted and kind in q.category), choice]
    batches = []
    for start in range(0, n, batch_size):
        chunk = rows[start : min(start + batch_size, n)]
        answers = [q.answer for q in chunk] if with_labels else None
        batches.append(encode(processor, [q.prompt for q in chunk], [q.image for q in chunk], answers))
    return batches
