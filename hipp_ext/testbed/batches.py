"""Calibration batches of the testbed's questions, through any vision-language processor."""

import itertools
from collections.abc import Sequence
from typing import Any

from hipp_ext.calibration.batches import Batch, Task
from hipp_ext.calibration.encoding import encode, encode_text
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
    """Batches for `model(**batch)`, with POPE and ScienceQA questions in turn.

    Every POPE row has its own picture. The answers "yes" and "no" alternate, and so do the three
    kinds of absent objects.

    Args:
        processor: processor of the testbed's model, or of another vision-language model with a
            chat template.
        n: number of rows.
        batch_size: rows per batch.
        split: split of the questions; "calibration" keeps the other splits unseen.
        with_labels: end each row with the answer, and add labels (-100 except for the answer).

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
    """The same questions by task, with labels: ScienceQA for "utility", POPE for "robustness".

    Raises:
        CalibrationError: `n` is below 2, so that a task has no question, or `batch_size` below 1.
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
    """`n` ScienceQA questions without pictures, with labels, through a language model's tokenizer.

    Raises:
        CalibrationError: `n` or `batch_size` is below 1.
    """
    _check_sizes(n, batch_size)
    texts = (q for q in choice_stream(split) if q.scene is None)
    return [
        encode_text(tokenizer, [q.prompt for q in rows], [q.answer for q in rows])
        for rows in _chunks(list(itertools.islice(texts, n)), batch_size)
    ]


def _check_sizes(n: int, batch_size: int) -> None:
    if whole(n) is None or whole(batch_size) is None or n < 1 or batch_size < 1:
        raise CalibrationError(
            f"calibration batches need n >= 1 and batch_size >= 1, got n={n}, {batch_size=}."
        )


def _questions(n: int, batch_size: int, split: str) -> tuple[list[Question], list[Question]]:
    """(questions of POPE, questions of ScienceQA), `n` in total."""
    _check_sizes(n, batch_size)
    pope: list[Question] = []
    for number, group in enumerate(itertools.islice(pope_groups(split), (n + 1) // 2)):
        kind = ("random", "popular", "adversarial")[number // 2 % 3]
        answer = "No" if number % 2 else "Yes"
        pope.append(next(q for q in group if q.answer == answer and kind in q.category))
    return pope, list(itertools.islice(choice_stream(split), n // 2))


def _batches(
    processor: Any, rows: Sequence[Question], batch_size: int, with_labels: bool = True
) -> list[Batch]:
    return [
        encode(
            processor,
            [q.prompt for q in chunk],
            [q.image for q in chunk],
            [q.answer for q in chunk] if with_labels else None,
        )
        for chunk in _chunks(rows, batch_size)
    ]


def _chunks(rows: Sequence[Question], size: int) -> list[Sequence[Question]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
