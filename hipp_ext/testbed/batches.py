"""Calibration batches of the testbed: pictures and questions through any vision-language processor."""

import itertools
from collections.abc import Sequence
from typing import Any

from hipp_ext.calibration import Batch, Task, encode, encode_text
from hipp_ext.errors import CalibrationError
from hipp_ext.quantities import whole
from hipp_ext.testbed.quiz import Question, choice_stream, pope_groups


def calibration_batches(
    processor: Any,
    n: int = 64,
    batch_size: int = 16,
    split: str = "calibration",
    with_labels: bool = True,
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
    pope, choice = _questions(n, batch_size, split)
    rows = [q for pair in itertools.zip_longest(pope, choice) for q in pair if q is not None]
    return _batches(processor, rows, batch_size, with_labels)


def calibration_tasks(
    processor: Any, n: int = 64, batch_size: int = 16, split: str = "calibration"
) -> dict[Task, list[Batch]]:
    """The same questions by task: those of ScienceQA for "utility", those of POPE for "robustness"; with labels.

    Raises:
        CalibrationError: `n` is below 2, so that a task would have no question, or `batch_size` below 1.
    """
    if whole(n) is None or n < 2:
        raise CalibrationError(f"calibration_tasks needs n >= 2, a row for each task, got n={n}.")
    pope, choice = _questions(n, batch_size, split)
    return {
        "utility": _batches(processor, choice, batch_size),
        "robustness": _batches(processor, pope, batch_size),
    }


def calibration_texts(
    tokenizer: Any, n: int = 64, batch_size: int = 16, split: str = "calibration"
) -> list[Batch]:
    """`n` of the ScienceQA questions that need no picture, through the tokenizer of a language model; with labels.

    Raises:
        CalibrationError: `n` or `batch_size` is below 1.
    """
    rows = list(
        itertools.islice(
            (q for q in choice_stream(split) if q.scene is None), _at_least_one(n, batch_size)
        )
    )
    chunks = [rows[start : start + batch_size] for start in range(0, n, batch_size)]
    return [
        encode_text(tokenizer, [q.prompt for q in chunk], [q.answer for q in chunk])
        for chunk in chunks
    ]


def _at_least_one(n: int, batch_size: int) -> int:
    if whole(n) is None or whole(batch_size) is None or n < 1 or batch_size < 1:
        raise CalibrationError(
            f"calibration batches need n >= 1 and batch_size >= 1, got n={n}, {batch_size=}."
        )
    return n


def _questions(n: int, batch_size: int, split: str) -> tuple[list[Question], list[Question]]:
    """`n` in all, of POPE and of ScienceQA."""
    _at_least_one(n, batch_size)
    pope: list[Question] = []
    choice: list[Question] = []
    for number, (group, other) in enumerate(
        zip(pope_groups(split), choice_stream(split), strict=False)
    ):
        if len(pope) + len(choice) >= n:
            break
        kind = ("random", "popular", "adversarial")[number // 2 % 3]
        wanted = "No" if number % 2 else "Yes"
        pope.append(next(q for q in group if q.answer == wanted and kind in q.category))
        choice.append(other)
    return pope, choice[: n - len(pope)]


def _batches(
    processor: Any, rows: Sequence[Question], batch_size: int, with_labels: bool = True
) -> list[Batch]:
    batches = []
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        answers = [q.answer for q in chunk] if with_labels else None
        batches.append(
            encode(processor, [q.prompt for q in chunk], [q.image for q in chunk], answers)
        )
    return batches
