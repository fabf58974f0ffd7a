"""Rows of a user's file -> batches through the model's own processor, and what was left out."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hipp_ext.calibration.batches import Batch, Task
from hipp_ext.calibration.encoding import encode_rendered, padded
from hipp_ext.calibration.fitting import CHARACTERS, Fitter, Row
from hipp_ext.calibration.records import Record, read_passages, read_records, spaced
from hipp_ext.errors import CalibrationError, DataError
from hipp_ext.files.untrusted import shown
from hipp_ext.quantities import whole_option

ROWS = 128  # number of rows that are taken from a file
LENGTH = 2048  # longest row [tokens], where the tokenizer allows it


@dataclass(frozen=True, kw_only=True)
class Reader(Fitter):
    """Reads files for one processor.

    Attributes:
        batch_size: rows of a batch.
        answered: leave out rows without an answer.
    """

    batch_size: int
    answered: bool = False

    def read(self, path: Path, rows: int) -> tuple[list[Row], list[str]]:
        """The rows of a file that can be used, and a line for each that was left out.

        Raises:
            CalibrationError: the file is of no kind that is read, or none of its rows fits.
            DataError: the file cannot be read, or is damaged.
        """
        fitting, refused = self.examine(path, rows)
        skipped = [f"row {number}: {shown(error, 300)}" for number, error in refused]
        if not fitting:
            raise CalibrationError(
                f"None of the {len(skipped)} rows of {shown(path)} can be used. {listed(skipped)}"
            )
        return fitting, skipped

    def examine(self, path: Path, rows: int) -> tuple[list[Row], list[tuple[int, DataError]]]:
        """As `read`, but with the numbers of the rows that were left out and why; also of a file
        without a row that fits.
        """
        if path.suffix.lower() == ".txt" and not path.is_dir():
            records = self._text_file(path, rows)
        else:
            records = read_records(path, rows)
        fitting, refused = list[Row](), []
        for number, record in records:
            try:
                row = self.fit(record)
                if self.answered and row.answer is None:
                    raise DataError("it has no answer")
                fitting.append(row)
            except DataError as error:
                refused.append((number, error))
        return fitting, refused

    def _text_file(self, path: Path, rows: int) -> list[Record]:
        """Chunks of `length` tokens, evenly spaced; a rest is left out, unless it is all."""
        texts, apart = read_passages(path, rows, self.length * CHARACTERS)
        # The token that the tokenizer puts before every text, if it has one.
        bos = getattr(self.tokenizer, "bos_token_id", None)
        begins = bos is not None and self.tokenizer("")["input_ids"][:1] == [bos]
        beginning = (bos,) if begins else ()
        size = self.length - len(beginning)
        chunks = []
        for text in texts:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            count = 1 if apart else max(1, len(ids) // size)
            chunks += [tuple(ids[i * size : (i + 1) * size]) for i in range(count)]
        picks = spaced(len(chunks), rows)
        return [(i + 1, (*beginning, *chunks[i])) for i in picks]

    def groups(self, rows: Sequence[Row]) -> list[list[int]]:
        """The numbers of the rows of each batch: rows of similar length; texts, chats, pictures
        and answers apart."""
        groups = list[list[int]]()
        order = sorted(range(len(rows)), key=lambda i: (*rows[i].kind, rows[i].tokens))
        for _, alike in itertools.groupby(order, lambda i: rows[i].kind):
            while some := list(itertools.islice(alike, self.batch_size)):
                groups.append(some)
        return groups

    def batch(self, rows: Sequence[Row]) -> Batch:
        """The batch of rows that `groups` puts together."""
        if texts := [row.ids for row in rows if row.ids]:
            labels = [[-100, *t[1:]] for t in texts]  # nothing predicts the first token
            return padded(self.tokenizer, texts, labels)
        answers = [row.answer for row in rows if row.answer is not None] or None
        pictures = [self.pictures(row.sources) for row in rows]
        rendered = [row.rendered for row in rows]
        return cut(encode_rendered(self.processor, rendered, pictures, answers), self.length)


def make_reader(
    file: Path,
    processor: Any,
    *,
    image_folder: str | Path | None,
    sequence_length: int | None,
    batch_size: int,
    answered: bool = False,
) -> Reader:
    """The reader of a file, with the defaults of `Calibration.from_file`, which has the options."""
    if processor is None:
        raise CalibrationError(
            "No processor was given, and none lies beside the model's weights: pass processor=."
        )
    if sequence_length is None:
        tokenizer = getattr(processor, "tokenizer", processor)
        sequence_length = int(min(LENGTH, getattr(tokenizer, "model_max_length", LENGTH)))
    return Reader(
        processor=processor,
        folder=Path(image_folder or (file if file.is_dir() else file.parent)),
        length=whole_option("sequence_length", sequence_length, CalibrationError, 2),
        batch_size=whole_option("batch_size", batch_size, CalibrationError, 1),
        answered=answered,
    )


def warn_left_out(lines: Sequence[str], used: int, file: Path, what: str) -> None:
    """Warn that rows of the file were left out of `what`, if any were."""
    if lines:
        warnings.warn(
            f"{len(lines)} of {len(lines) + used} rows of {shown(file)} were left out of the "
            f"{what}: {listed(lines)}",
            stacklevel=4,
        )


def read_files(
    paths: Mapping[Task, str | Path],
    processor: Any,
    image_folder: str | Path | None,
    rows: int | None,
    sequence_length: int | None,
    batch_size: int,
) -> tuple[dict[Task, tuple[Batch, ...]], tuple[str, ...]]:
    """Batches by task, and rows left out; see `Calibration.from_file`. A file is read once."""
    rows = whole_option("rows", ROWS if rows is None else rows, CalibrationError, 1)
    read: dict[Path, tuple[Batch, ...]] = {}
    skipped: list[str] = []
    for file in dict.fromkeys(map(Path, paths.values())):
        reader = make_reader(
            file,
            processor,
            image_folder=image_folder,
            sequence_length=sequence_length,
            batch_size=batch_size,
        )
        fitting, left_out = reader.read(file, rows)
        read[file] = tuple(
            reader.batch([fitting[i] for i in own]) for own in reader.groups(fitting)
        )
        skipped += [f"{shown(file)}, {line}" for line in left_out]
        warn_left_out(left_out, len(fitting), file, "calibration")
    return {task: read[Path(path)] for task, path in paths.items()}, tuple(skipped)


def cut(batch: Batch, length: int) -> Batch:
    """The batch with the first `length` tokens of each row, padded on the left."""
    mask = batch["attention_mask"]
    total, sizes = mask.shape[1], mask.sum(1)
    if int(sizes.max()) <= length:
        return batch
    kept = sizes.clamp(max=length)
    width = int(kept.max())
    columns = (total - sizes + kept - width)[:, None] + torch.arange(width)
    rows = torch.arange(len(mask))[:, None]
    return {
        name: value[rows, columns] if value.shape[:2] == mask.shape else value
        for name, value in batch.items()
    }


def listed(lines: Sequence[str], most: int = 3) -> str:
    """The first lines, and how many more there are."""
    more = f"; and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more
