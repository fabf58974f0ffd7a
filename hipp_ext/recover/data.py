"""Data sources of `recover`: for every step and process, batches of questions with answers."""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from hipp_ext.calibration import Batch, encode, encode_text, is_tokenizer
from hipp_ext.errors import CalibrationError, DataError


@runtime_checkable
class DataSource(Protocol):
    """Endless training data: equal for equal seeds, different on every process."""

    def batches(self, rank: int, workers: int, start: int) -> Iterator[list[Batch]]:
        """For each step from `start` on, batches with labels; the losses of a step are summed.

        Args:
            rank: number of this process, from 0.
            workers: number of processes.
            start: first step.
        """
        ...


class TestbedData:
    """The testbed's training split: checks, questions on pictures, captions, facts, choices.

    Nothing of it is in the splits for calibration, search, validation and test. The testbed's
    model gets whole conversations. Any other model gets questions, one per row, with their
    pictures through its own processor and chat template. They are about a toy world: they show
    that recovery runs, and do not replace data of your own.

    Args:
        processor: processor of the model. A language model has a tokenizer here, and gets the
            questions that need no picture.
        seed: random seed of the order.
        share: fraction of 48 rows that a process takes per step, for the testbed's model.
        batch_size: rows of each kind of question per process and step, for any other model.

    Raises:
        CalibrationError: `processor` is None.
    """

    __test__ = False  # pytest would collect the class

    def __init__(self, processor: Any, seed: int = 0, share: float = 1.0, batch_size: int = 8):
        if processor is None:
            raise CalibrationError(
                "No processor was given, and there is none in the folder of the model: save one "
                "into that folder."
            )
        self.processor, self.seed, self.share, self.batch_size = processor, seed, share, batch_size

    def batches(self, rank: int, workers: int, start: int) -> Iterator[list[Batch]]:
        from hipp_ext.testbed.conversations import RECOVERY, collate, training_questions
        from hipp_ext.testbed.model import is_own_processor

        # The streams of a seed use the next three numbers, too.
        seed = 1000 + 10 * (self.seed * workers + rank)
        streams: list[tuple[Iterator[Any], int]]
        if is_own_processor(self.processor):
            streams = [(make(seed), max(1, round(self.share * rows))) for make, rows in RECOVERY]
            encode_rows = collate
        else:
            pictures = not is_tokenizer(self.processor)
            kinds = training_questions(seed, pictures=pictures)
            streams = [(kind, self.batch_size) for kind in kinds]
            encode_rows = _encode
        for stream, rows in streams:  # earlier steps have taken these
            next(itertools.islice(stream, start * rows, start * rows), None)
        while True:
            yield [
                encode_rows(self.processor, list(itertools.islice(stream, rows)))
                for stream, rows in streams
            ]


class QuestionData:
    """Questions of one or more data sets; each data set makes one batch per step.

    Every epoch has a new order.

    Args:
        processor: processor of a vision-language model with a chat template, or the tokenizer of
            a language model.
        tasks: questions of each data set, with prompt, image and answer, as
            `hipp_ext.evals.questions.table_questions` makes them.
        batch_size: rows per data set, process and step.
        seed: random seed of the order.

    Raises:
        DataError: a data set has fewer questions than the processes take in a step, or its
            questions have pictures that the model does not take.
    """

    def __init__(
        self, processor: Any, tasks: Sequence[Sequence[Any]], batch_size: int = 8, seed: int = 0
    ):
        self.processor, self.batch_size, self.seed = processor, batch_size, seed
        self.tasks = [list(task) for task in tasks]

    def batches(self, rank: int, workers: int, start: int) -> Iterator[list[Batch]]:
        taken = workers * self.batch_size
        if short := [len(task) for task in self.tasks if len(task) < taken]:
            raise DataError(
                f"A task has {short[0]} questions, and {workers} processes of {self.batch_size} "
                f"rows take {taken} in a step: give more questions or a smaller batch."
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
            f"The questions have pictures, and {type(processor).__name__} takes none: leave out "
            "--pope and --scienceqa, or train on text of your own with transformers' Trainer and "
            "save_pruned."
        )
    return encode_text(processor, prompts, answers)
