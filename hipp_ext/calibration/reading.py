"""Rows of a user's file -> batches through the model's own processor, and what was left out."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hipp_ext.calibration.batches import Batch, Task
from hipp_ext.calibration.chats import Chat, parse_row, read_source
from hipp_ext.calibration.encoding import (
    Rendered,
    encode_rendered,
    is_tokenizer,
    padded,
    render,
    text_of,
)
from hipp_ext.calibration.records import Record, read_passages, read_records
from hipp_ext.errors import CalibrationError, DataError
from hipp_ext.files.untrusted import PICTURE_PIXELS, shown
from hipp_ext.quantities import whole

ROWS = 128  # number of rows that are taken from a file
LENGTH = 2048  # longest row [tokens], where the tokenizer allows it
CHARACTERS = 16  # of a text for each token of sequence_length; most tokens are shorter


@dataclass(frozen=True, kw_only=True)
class ChatRow:
    """A chat that fits, as a text for the processor.

    Attributes:
        tokens: number of its tokens, after the cut to the sequence length.
        rendered: the chat up to the answer.
        answer: the assistant's turn that follows, or None.
        sources: its pictures.
    """

    tokens: int
    rendered: Rendered
    answer: str | None
    sources: tuple[Any, ...]

    @property
    def key(self) -> tuple[bool, bool, bool, int]:
        """Rows of one batch have the same key but for the number of tokens, which is similar."""
        return False, bool(self.sources), self.answer is not None, self.tokens


@dataclass(frozen=True, kw_only=True)
class TextRow:
    """Token ids of a plain text."""

    ids: tuple[int, ...]

    @property
    def key(self) -> tuple[bool, bool, bool, int]:
        """As for `ChatRow`."""
        return True, False, True, len(self.ids)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Reads files for one processor.

    Attributes:
        processor: processor, or tokenizer, of the model.
        folder: where pictures are.
        length: most tokens of a row.
        batch_size: rows of a batch.
    """

    processor: Any
    folder: Path
    length: int
    batch_size: int

    @property
    def tokenizer(self) -> Any:
        """The processor's part for text."""
        return getattr(self.processor, "tokenizer", self.processor)

    def read(self, path: Path, rows: int) -> tuple[list[Batch], list[str]]:
        """The batches of a file, and a line for each row that was left out.

        Raises:
            CalibrationError: the file is of no kind that is read, or none of its rows fits.
            DataError: the file cannot be read, or is damaged.
        """
        if path.suffix.lower() == ".txt" and not path.is_dir():
            records = self._text_file(path, rows)
        else:
            records = read_records(path, rows)
        fitting: list[ChatRow | TextRow] = []
        skipped = []
        for number, record in records:
            try:
                fitting.append(self._fit(record))
            except DataError as error:
                skipped.append(f"row {number}: {shown(error, 300)}")
        if not fitting:
            raise CalibrationError(
                f"None of the {len(records)} rows of {shown(path)} can be used. {listed(skipped)}"
            )
        return self._batches(fitting), skipped

    def _text_file(self, path: Path, rows: int) -> list[Record]:
        """Chunks of `length` tokens, evenly spaced; a rest is left out, unless it is all."""
        texts, apart = read_passages(path, rows, self.length * CHARACTERS)
        size = self.length - len(self._beginning)
        chunks = []
        for text in texts:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            count = 1 if apart else max(1, len(ids) // size)
            chunks += [tuple(ids[i * size : (i + 1) * size]) for i in range(count)]
        picks = range(len(chunks))
        if rows < len(chunks):
            picks = [i * len(chunks) // rows for i in range(rows)]
        return [(i + 1, (*self._beginning, *chunks[i])) for i in picks]

    @property
    def _beginning(self) -> tuple[int, ...]:
        """The token that the tokenizer puts before every text, if it has one."""
        tokenizer = self.tokenizer
        bos = getattr(tokenizer, "bos_token_id", None)
        return (bos,) if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else ()

    def _fit(self, record: Any) -> ChatRow | TextRow:
        """Raises DataError for what does not fit."""
        parsed = record if isinstance(record, tuple) else parse_row(record)
        if isinstance(parsed, Chat):
            return self._fit_chat(parsed)
        if isinstance(parsed, str):
            text = parsed[: self.length * CHARACTERS]
            parsed = tuple(self.tokenizer(text, verbose=False)["input_ids"][: self.length])
        if len(parsed) < 2:
            raise DataError("its text has fewer than two tokens")
        if self._image_token in parsed:
            raise DataError("its text holds the token that stands for pictures")
        return TextRow(ids=parsed)

    @property
    def _image_token(self) -> int | None:
        return getattr(self.processor, "image_token_id", None)

    def _fit_chat(self, chat: Chat) -> ChatRow:
        """The chat up to its last answer that begins within the sequence length."""
        if chat.sources and is_tokenizer(self.processor):
            raise DataError(f"it has a picture, and {type(self.processor).__name__} takes none")
        messages = chat.messages
        answers = [
            i
            for i, m in enumerate(messages)
            if i and m["role"] == "assistant" and text_of(m).strip()
        ]
        pictures = self._pictures(chat.sources)
        ends = answers or [len(messages)]
        # Later answers begin later: the last one that fits is found by bisection, the very last
        # one being tried first.
        low, high, middle = 0, len(ends), len(ends) - 1
        fitting: ChatRow | DataError = DataError("it is empty")
        while low < high:
            asked = messages[: ends[middle]]
            own = sum(part["type"] == "image" for m in asked for part in m["content"])
            answer = text_of(messages[ends[middle]]) if answers else None
            try:
                fitting = self._measured(asked, answer, chat.sources[:own], pictures[:own])
                low = middle + 1
            except _TooLong as error:
                fitting = fitting if isinstance(fitting, ChatRow) else error
                high = middle
            middle = (low + high) // 2
        if isinstance(fitting, DataError):
            raise fitting
        return fitting

    def _pictures(self, sources: Sequence[Any]) -> list[Any]:
        pictures = []
        for source in sources:
            pictures.append(read_source(source, self.folder))
            if sum(p.width * p.height for p in pictures) > PICTURE_PIXELS:
                raise DataError(f"its pictures have more than {PICTURE_PIXELS:,} pixels in all")
        return pictures

    def _measured(
        self,
        asked: Sequence[Any],
        answer: str | None,
        sources: tuple[Any, ...],
        pictures: list[Any],
    ) -> ChatRow:
        answers = None if answer is None else [answer]
        try:
            rendered = render(self.processor, asked)
            batch = encode_rendered(self.processor, [rendered], [pictures], answers)
        except Exception as error:  # templates and processors raise anything
            name = type(self.processor).__name__
            raise DataError(f"{name} does not take it: {shown(error, 200)}") from None
        ids = batch["input_ids"][0]
        places = torch.nonzero(
            ids == self._image_token if self._image_token is not None else ids < 0
        )
        if self._image_token is not None and bool(pictures) != bool(len(places)):
            raise DataError(
                "its text holds the token that stands for pictures"
                if len(places)
                else "the chat template leaves its picture out"
            )
        if pictures and (len(ids) if not len(places) else int(places[-1]) + 1) > self.length:
            raise _TooLong(f"its pictures do not fit into {self.length} tokens")
        if answer is not None:
            labelled = torch.nonzero(batch["labels"][0] != -100)
            if not len(labelled):
                raise DataError("its answer has no token")
            if int(labelled[0]) >= self.length:
                raise _TooLong(f"its answer begins after {self.length} tokens")
        tokens = min(len(ids), self.length)
        return ChatRow(tokens=tokens, rendered=rendered, answer=answer, sources=sources)

    def _batches(self, rows: Sequence[ChatRow | TextRow]) -> list[Batch]:
        """Batches of rows of similar length; texts, chats, pictures and answers apart."""
        rows, batches = sorted(rows, key=lambda row: row.key), []
        while rows:
            alike = [row for row in rows[: self.batch_size] if row.key[:3] == rows[0].key[:3]]
            batches.append(self._batch(alike))
            rows = rows[len(alike) :]
        return batches

    def _batch(self, rows: Sequence[ChatRow | TextRow]) -> Batch:
        texts = [row.ids for row in rows if isinstance(row, TextRow)]
        if texts:
            # The first half of a text is what its second half follows from.
            labels = [[-100] * ((len(t) + 1) // 2) + list(t[(len(t) + 1) // 2 :]) for t in texts]
            return padded(self.tokenizer, texts, labels)
        chats = [row for row in rows if isinstance(row, ChatRow)]
        answers = [row.answer for row in chats if row.answer is not None] or None
        pictures = [self._pictures(row.sources) for row in chats]
        rendered = [row.rendered for row in chats]
        return cut(encode_rendered(self.processor, rendered, pictures, answers), self.length)


def read_files(
    paths: Mapping[Task, str | Path],
    processor: Any,
    image_folder: str | Path | None,
    rows: int | None,
    sequence_length: int | None,
    batch_size: int,
) -> tuple[dict[Task, tuple[Batch, ...]], tuple[str, ...]]:
    """Batches by task, and rows left out; see `Calibration.from_file`. A file is read once."""
    if processor is None:
        raise CalibrationError(
            "No processor was given, and none lies beside the model's weights: pass processor=."
        )
    if sequence_length is None:
        tokenizer = getattr(processor, "tokenizer", processor)
        sequence_length = int(min(LENGTH, getattr(tokenizer, "model_max_length", LENGTH)))
    rows = _at_least(1, "rows", ROWS if rows is None else rows)
    read: dict[Path, tuple[Batch, ...]] = {}
    skipped: list[str] = []
    for file in dict.fromkeys(map(Path, paths.values())):
        reader = Reader(
            processor=processor,
            folder=Path(image_folder or (file if file.is_dir() else file.parent)),
            length=_at_least(2, "sequence_length", sequence_length),
            batch_size=_at_least(1, "batch_size", batch_size),
        )
        batches, left_out = reader.read(file, rows)
        read[file] = tuple(batches)
        skipped += [f"{shown(file)}, {line}" for line in left_out]
        if left_out:
            total = len(left_out) + sum(len(batch["input_ids"]) for batch in batches)
            warnings.warn(
                f"{len(left_out)} of {total} rows of {shown(file)} were left out of the "
                f"calibration: {listed(left_out)}",
                stacklevel=3,
            )
    return {task: read[Path(path)] for task, path in paths.items()}, tuple(skipped)


def _at_least(least: int, name: str, value: Any) -> int:
    number = whole(value)
    if number is None or number < least:
        raise CalibrationError(f"{name}={value!r}: a whole number of {least} or more is needed.")
    return number


class _TooLong(DataError):
    """A chat that would fit if it were shorter."""


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
