"""A row of a user's file -> a row that fits the processor and the sequence length, or why not."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hipp_ext.calibration.chats import Chat, parse_row
from hipp_ext.calibration.encoding import Rendered, encode_rendered, is_tokenizer, render, text_of
from hipp_ext.calibration.pictures import UnreadPictureError, read_source
from hipp_ext.errors import DataError
from hipp_ext.files.untrusted import PICTURE_PIXELS, shown

CHARACTERS = 16  # of a text for each token of sequence_length; most tokens are shorter


@dataclass(frozen=True, kw_only=True)
class Row:
    """A chat or a text that fits, as what the processor takes.

    Attributes:
        tokens: number of its tokens, after the cut to the sequence length.
        ids: token ids of a text; empty for a chat.
        rendered: the chat up to the answer.
        answer: the assistant's turn that follows, or None.
        sources: its pictures.
    """

    tokens: int
    ids: tuple[int, ...] = ()
    rendered: Rendered = ("", False)
    answer: str | None = None
    sources: tuple[Any, ...] = ()

    @property
    def kind(self) -> tuple[bool, bool, bool]:
        """What the rows of one batch have in common."""
        return bool(self.ids), bool(self.sources), self.answer is not None


@dataclass(frozen=True, kw_only=True)
class Fitter:
    """Fits rows to one processor.

    Attributes:
        processor: processor, or tokenizer, of the model.
        folder: where pictures are.
        length: most tokens of a row.
    """

    processor: Any
    folder: Path
    length: int

    @property
    def tokenizer(self) -> Any:
        """The processor's part for text."""
        return getattr(self.processor, "tokenizer", self.processor)

    def fit(self, record: Any) -> Row:
        """The row as what is encoded; raises DataError for a row that does not fit."""
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
        return Row(tokens=len(parsed), ids=parsed)

    @property
    def _image_token(self) -> int | None:
        return getattr(self.processor, "image_token_id", None)

    def _fit_chat(self, chat: Chat) -> Row:
        """The chat up to its last answer that begins within the sequence length."""
        if chat.sources and is_tokenizer(self.processor):
            raise DataError(f"it has a picture, and {type(self.processor).__name__} takes none")
        messages = chat.messages
        turns = enumerate(messages[1:], 1)
        answers = [i for i, m in turns if m["role"] == "assistant" and text_of(m).strip()]
        pictures = self.pictures(chat.sources)
        ends = answers or [len(messages)]
        # Later answers begin later: the last one that fits is found by bisection, the very last
        # one being tried first.
        low, high, middle = 0, len(ends), len(ends) - 1
        fitting: Row | DataError = DataError("it is empty")
        while low < high:
            asked = messages[: ends[middle]]
            own = sum(part["type"] == "image" for m in asked for part in m["content"])
            answer = text_of(messages[ends[middle]]) if answers else None
            try:
                fitting = self._measured(asked, answer, chat.sources[:own], pictures[:own])
                low = middle + 1
            except _TooLong as error:
                fitting = fitting if isinstance(fitting, Row) else error
                high = middle
            middle = (low + high) // 2
        if isinstance(fitting, DataError):
            raise fitting
        return fitting

    def pictures(self, sources: Sequence[Any]) -> list[Any]:
        """The pictures of a row, decoded."""
        pictures = []
        for source in sources:
            try:
                pictures.append(read_source(source, self.folder))
            except DataError as error:
                raise UnreadPictureError(str(error)) from None
            if sum(p.width * p.height for p in pictures) > PICTURE_PIXELS:
                raise DataError(f"its pictures have more than {PICTURE_PIXELS:,} pixels in all")
        return pictures

    def _measured(
        self,
        asked: Sequence[Any],
        answer: str | None,
        sources: tuple[Any, ...],
        pictures: list[Any],
    ) -> Row:
        answers = None if answer is None else [answer]
        try:
            rendered = render(self.processor, asked)
            batch = encode_rendered(self.processor, [rendered], [pictures], answers)
        except Exception as error:  # templates and processors raise anything
            name = type(self.processor).__name__
            raise DataError(f"{name} does not take it: {shown(error, 200)}") from None
        ids, token = batch["input_ids"][0], self._image_token
        places = torch.nonzero(ids == (-1 if token is None else token))
        if token is not None and bool(pictures) != bool(len(places)):
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
        return Row(tokens=tokens, rendered=rendered, answer=answer, sources=sources)


class _TooLong(DataError):
    """A chat that would fit if it were shorter."""
