"""The rows of the user's file as training data, read and encoded when they are needed."""

import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from hipp_ext.calibration import Batch
from hipp_ext.calibration.fitting import CHARACTERS, Row
from hipp_ext.calibration.reading import make_reader
from hipp_ext.calibration.row_file import open_rows
from hipp_ext.errors import CalibrationError, DataError
from hipp_ext.files.untrusted import shown
from hipp_ext.quantities import finite_option, whole_option
from hipp_ext.recover.order import epoch_groups, fill_bins
from hipp_ext.recover.row_batches import RowEncoder

TRIED = 1000  # rows that are tried for one that can be used
SAMPLED = 32  # rows that tell how many tokens a byte has


class FileData:
    """The rows of a file of chats, questions or texts, in an order that follows from the seed.

    `Calibration.from_file` says which files are read. One pass notes where the rows are (24 bytes a
    row are held); a row is read and encoded when its step comes. The labels of a chat are its last
    answer that begins within `sequence_length`; those of a text are all its tokens.

    A row that cannot be used (a picture that cannot be read, no answer, an answer that begins too
    late, ...) is replaced by the next row of the file that can: the same one for every process and
    in every run. `skipped` names the rows and says why.

    Args:
        path: the file, or a folder that `datasets` saved.
        processor: processor of the model; of a language model, its tokenizer.
        image_folder: folder that paths of pictures start from; None: the folder of the file.
        sequence_length: tokens after which a row is cut; None: 2048, or what the tokenizer allows.
        batch_size: rows per process and step; packed rows, if `packed`.
        packed: put several rows behind each other until `sequence_length` is full. Each begins at
            position 0, and transformers lets none see another. For rows without pictures. How many
            fit is estimated from their bytes; what is too much is cut off.
        holdout: fraction of the rows that is not trained on but evaluated. Whether a row belongs to
            it follows from its content alone.
        holdout_rows: most rows that an evaluation takes.
        seed: random seed of the order.

    Attributes:
        skipped: number of each row that could not be used, from 1 -> the reason.
        trained, held: numbers of the rows for training and for evaluation, from 0.

    Raises:
        CalibrationError: the file is of no kind that is read, has no rows, or nothing is left for
            training.
        DataError: the file cannot be read, or is damaged.
    """

    token_mean = True  # the loss of a step is the mean over all its tokens

    def __init__(
        self,
        path: str | Path,
        processor: Any,
        *,
        image_folder: str | Path | None = None,
        sequence_length: int | None = None,
        batch_size: int = 8,
        packed: bool = False,
        holdout: float = 0.0,
        holdout_rows: int = 256,
        seed: int = 0,
    ):
        self.path, self.packed = Path(path), packed
        self.reader = make_reader(
            self.path,
            processor,
            image_folder=image_folder,
            sequence_length=sequence_length,
            batch_size=batch_size,
        )
        self.seed = whole_option("seed", seed, CalibrationError, 0)
        self.holdout = finite_option("holdout", holdout, CalibrationError, zero=True)
        if self.holdout >= 1:
            raise CalibrationError(f"holdout={holdout!r}: a fraction below 1 is needed.")
        self.file = open_rows(self.path, self._text_bytes)
        held = self.file.digests < np.uint64(int(self.holdout * 2.0**64))
        self.trained = np.flatnonzero(~held)
        most = whole_option("holdout_rows", holdout_rows, CalibrationError, 1)
        self.held = np.flatnonzero(held)
        # The choice among those held out does not depend on their places either.
        self.held = np.sort(
            self.held[np.argsort(self.file.digests[self.held], kind="stable")][:most]
        )
        if not len(self.trained) or (self.holdout and not len(self.held)):
            raise CalibrationError(
                f"{shown(self.path)} has {len(held)} rows, and with holdout={self.holdout} "
                f"{len(self.held)} are held out and {len(self.trained)} left for training: give "
                "more rows or another fraction."
            )
        self.skipped: dict[int, str] = {}
        self._encoder = RowEncoder(reader=self.reader, file=self.file, packed=packed)
        self._encoding = threading.Lock()  # tokenizers are not made for several threads

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to go on."""
        return {
            "rows": self.file.digest,
            "sequence_length": self.reader.length,
            "batch_size": self.reader.batch_size,
            "packed": self.packed,
            "holdout": self.holdout,
            "seed": self.seed,
        }

    def batches(self, rank: int, workers: int, start: int) -> Iterator[list[Batch]]:
        """See `DataSource`; rows of one batch are all texts, or have all pictures, or none.

        The batches of the next step are made while those of this one are in use.
        """
        width = workers * self.reader.batch_size
        members = self._bins() if self.packed else [(int(i),) for i in self.trained]
        if len(members) < width:
            raise DataError(
                f"{shown(self.path)} has {len(members)} {'packed ' * self.packed}rows to train on, "
                f"and {workers} processes of {self.reader.batch_size} rows take {width} in a step: "
                "give more rows or a smaller batch."
            )
        sizes = np.array([sum(int(self.file.sizes[i]) for i in own) for own in members])

        def chosen() -> Iterator[list[Sequence[int]]]:
            epoch, groups = -1, np.zeros((0, width), int)
            for step in itertools.count(start):
                wanted, place = divmod(step, len(members) // width)
                if wanted != epoch:
                    numbers = np.arange(len(members))
                    epoch, groups = wanted, epoch_groups(numbers, sizes, width, self.seed, wanted)
                yield [members[i] for i in groups[place, rank::workers]]

        return self._ahead(chosen())

    def held_out(self, rank: int, workers: int) -> Iterator[Batch]:
        """The batches of the held-out rows that this process evaluates; it may have none."""
        own = self.held[np.argsort(self.file.sizes[self.held], kind="stable")][rank::workers]
        for first in range(0, len(own), self.reader.batch_size):
            yield from self._only_usable(own[first : first + self.reader.batch_size])

    def __len__(self) -> int:
        """Number of steps of `once`."""
        return -(-len(self.file.sizes) // self.reader.batch_size)

    def once(self, start: int) -> Iterator[list[Batch]]:
        """For each step from `start` on, batches of rows: all of the file, each once.

        The rows are not packed, and those that are held out are among them.
        """
        order, size = np.argsort(self.file.sizes, kind="stable"), self.reader.batch_size
        for step in range(start, len(self)):
            yield self._only_usable(order[step * size : (step + 1) * size])

    def _ahead(self, chosen: Iterator[Sequence[Sequence[int]]]) -> Iterator[list[Batch]]:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(self._encoded, next(chosen))
            while True:
                batches, skipped = waiting.result()
                waiting = pool.submit(self._encoded, next(chosen))
                self.skipped |= skipped
                yield batches

    def _encoded(self, members: Sequence[Sequence[int]]) -> tuple[list[Batch], dict[int, str]]:
        """The batches of a step, and the rows that were skipped for them."""
        skipped: dict[int, str] = {}
        with self._encoding:
            rows = [[self._usable(i, skipped) for i in own] for own in members]
            if self.packed:
                return [self._encoder.pack(own) for own in rows], skipped
            return self._encoder.batches([row for own in rows for row in own]), skipped

    def _usable(self, number: int, skipped: dict[int, str]) -> tuple[int, Row]:
        """The row, or the next one for training that can be used."""
        first, tried = int(np.searchsorted(self.trained, number)), min(TRIED, len(self.trained))
        for place in range(first, first + tried):
            found = int(self.trained[place % len(self.trained)])
            if (row := self._encoder.row(found)) is not None:
                return found, row
            skipped[found + 1] = self._encoder.unusable[found + 1]
        reasons = "; ".join(f"row {n}: {why}" for n, why in sorted(skipped.items())[:3])
        raise CalibrationError(
            f"{shown(self.path)}: none of {tried} rows from row {number + 1} on can be used. "
            f"{reasons}"
        )

    def _only_usable(self, numbers: np.ndarray) -> list[Batch]:
        """The batches of those of the rows that can be used."""
        with self._encoding:
            tried = [(i, self._encoder.row(i)) for i in map(int, numbers)]
            lost = [i + 1 for i, row in tried if row is None]
            self.skipped |= {row: self._encoder.unusable[row] for row in lost}
            return self._encoder.batches([(i, row) for i, row in tried if row is not None])

    # ------------------------------------------------------------------------------ packed rows

    def _bins(self) -> list[tuple[int, ...]]:
        """The rows that are packed together, in an order that does not depend on the epoch."""
        order = np.random.default_rng([self.seed]).permutation(self.trained)
        tokens = np.minimum(self.file.sizes[order] * self._tokens_per_byte(), self.reader.length)
        begins = fill_bins(np.ceil(tokens).astype(int).tolist(), self.reader.length)
        return [tuple(own.tolist()) for own in np.split(order, begins[1:])]

    def _tokens_per_byte(self) -> float:
        """Of evenly spaced rows that can be used."""
        places = np.linspace(0, len(self.trained) - 1, min(SAMPLED, len(self.trained))).astype(int)
        with self._encoding:
            tried = [(i, self._encoder.row(i)) for i in map(int, self.trained[places])]
        size = sum(int(self.file.sizes[i]) for i, row in tried if row is not None)
        return sum(row.tokens for _, row in tried if row is not None) / size if size else 1.0

    def _text_bytes(self) -> int:
        """Bytes of a plain text that have about as many tokens as a row."""
        with self.path.open("rb") as file:
            sample = file.read(self.reader.length * CHARACTERS).decode(errors="ignore")
        ids = self.reader.tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"]
        return max(1, len(sample.encode()) * self.reader.length // max(1, len(ids)))
