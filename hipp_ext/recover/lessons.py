"""What a pruned model learns from: for every step and process, batches of questions with their answers."""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from hipp_ext.calibration import Batch, encode, encode_text, is_tokenizer
from hipp_ext.errors import CalibrationError, DataError


class Lessons(Protocol):
    """Endless training data, the same for the same seed, different on every process."""

    def batches(self, rank: int, workers: int, start: int) -> Iterator[list[Batch]]:
        """For each step from `start` on: batches with labels, whose losses are added up."""
        ...


class TestbedLessons:
    """The testbed's training split: checks, questions about pictures, captions, facts, multiple choice.

    Nothing of it is in the splits for calibration, search, validation and test. The testbed's model takes whole conversations;
    any other one takes questions, one a row, with their pictures through its own processor and in its own chat template. They
    are about a toy world: enough to see that recovery runs, and no replacement for data of the user's own.

    Args:
        processor: of the model; of a language model, which takes the questions that need no picture, its tokenizer.
        seed: of the order.
        share: of the rows that a process takes per step of the testbed's model; 1 means 48 rows.
        batch_size: rows of each kind of question, process and step, of any other model.

    Raises:
        CalibrationError: there is no processor.
    """

    __test__ = False  # for pytest, which would take it for a test

    def __init__(self, processor: Any, seed: int = 0, share: float = 1.0, batch_size: int = 8):
        if processor is None:
            raise CalibrationError(
                "No processor was given, and none lies beside the model's weights: save one into its folder."
            )
        self.processor, self.seed, self.share, self.batch_size = processor, seed, share, batch_size

    def batches(self, rank: int, workers: int, start: int) -> Iterator[list[Batch]]:
        from hipp_ext.testbed.model import is_own_processor
        from hipp_ext.testbed.training import RECOVERING, collate, questions_to_learn

        # Streams add up to three to their seed for kinds of their own.
        seed = 1000 + 10 * (self.seed * workers + rank)
        if not is_own_processor(self.processor):
            kinds = questions_to_learn(seed, pictures=not is_tokenizer(self.processor))
            for kind in kinds:
                next(itertools.islice(kind, start * self.batch_size, start * self.batch_size), None)
            while True:
                yield [
                    _encode(self.processor, list(itertools.islice(kind, self.batch_size)))
                    for kind in kinds
                ]
        streams = [(make(seed), max(1, round(self.share * rows))) for make, rows in RECOVERING]
        for stream, rows in streams:
            next(
                itertools.islice(stream, start * rows, start * rows), None
            )  # what earlier steps took
        while True:
            yield [
                collate(self.processor, list(itertools.islice(stream, rows)))
                for stream, rows in streams
            ]


class QuestionLessons:
    """Questions of one or more data sets, each its own batch per step; every epoch in a new order.

    Args:
        processor: of the model; a vision-language one with a chat template, or the tokenizer of a language model.
        tasks: per data set, questions with prompt, image and answer, as `hipp_ext.evals.questions.table_questions` makes them.
        batch_size: rows per task, process and step.
        seed: of the order.

    Raises:
        DataError: a task has fewer questions than the processes take in a step, or its questions have pictures, which the
            model does not take.
    """

    def __init__(
        self, processor: Any, tasks: Sequence[Sequence[Any]], batch_size: int = 8, seed: int = 0
    ):
        self.processor, self.tasks, self.batch_size, self.seed = (
            processor,
            [list(t) for t in tasks],
            batch_size,
            seed,
        )

    def batches(self, rank: int, workers: int, start: int) -> Iterator[list[Batch]]:
        taken = workers * self.batch_size
        if short := [len(task) for task in self.tasks if len(task) < taken]:
            raise DataError(
                f"A task has {short[0]} questions, and {workers} processes of {self.batch_size} rows take {taken} in a step: "
                "give more questions or a smaller batch."
            )
        for step in itertools.count(start):
            yield [self._batch(number, step, rank, taken) for number in range(len(self.tasks))]

    def _batch(self, number: int, step: int, rank: int, taken: int) -> Batch:
        task = self.tasks[number]
        epoch, place = divmod(step, len(task) // taken)
        order = random.Random(f"{self.seed} {number} {epoch}").sample(range(len(task)), len(task))
        first = place * taken + rank * self.batch_size
        rows = [task[i] for i in order[first : first + self.batch_size]]
        return _encode(self.processor, rows)


def _encode(processor: Any, rows: Sequence[Any]) -> Batch:
    prompts, images, answers = (
        [getattr(q, name) for q in rows] for name in ("prompt", "image", "answer")
    )
    if not is_tokenizer(processor):
        return encode(processor, prompts, images, answers)
    if any(image is not None for image in images):
        raise DataError(
            f"The questions have pictures, and {type(processor).__name__} takes none: leave out --pope and --scienceqa, or "
            "train on text of your own with transformers' Trainer and save_pruned."
        )
    return encode_text(processor, prompts, answers)
