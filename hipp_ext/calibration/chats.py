"""A row of a user's file -> a chat: messages, and where its pictures are."""

import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hipp_ext.calibration.encoding import Message
from hipp_ext.errors import DataError
from hipp_ext.files.untrusted import shown, the_only_one
from hipp_ext.prompts import choice_prompt

MOST_PICTURES = 64  # of one chat
MOST_CHARACTERS = 1 << 20  # of one chat
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
MARK = re.compile(r"\s*<image>\s*")


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Messages as transformers' chat templates take them, and a source for each of their pictures.

    Attributes:
        messages: dicts of role and content; content is a list of {"type": "text", "text": ...} and
            {"type": "image"}.
        sources: for each image part, in order, what `read_source` reads.
    """

    messages: tuple[Message, ...]
    sources: tuple[Any, ...]


def parse_row(row: Any) -> Chat | str:
    """The chat, or the plain text, that a row stands for.

    Args:
        row: a row of one of these shapes: {"messages": [...]} as OpenAI writes chats;
            {"conversations": [...], "image": ...} as LLaVA does; {"question": ..., "answer": ...}
            as a VLMEvalKit table does; {"text": ...}.

    Raises:
        DataError: the row has none of these shapes; the message begins with "it" or "its".
    """
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, Mapping):
        raise DataError(f"it is of type {type(row).__name__}, and an object is needed")
    for name, parse in _SHAPES.items():
        if row.get(name) is not None:
            parsed = parse(row)
            break
    else:
        raise DataError(
            f"it has none of {', '.join(_SHAPES)}, only {shown(', '.join(map(str, row)), 100)}"
        )
    if isinstance(parsed, str):
        return parsed
    texts = [p["text"] for m in parsed.messages for p in m["content"] if p["type"] == "text"]
    if sum(map(len, texts)) > MOST_CHARACTERS:
        raise DataError(f"its text has more than {MOST_CHARACTERS:,} characters")
    if len(parsed.sources) > MOST_PICTURES:
        raise DataError(f"it has {len(parsed.sources)} pictures; {MOST_PICTURES} are read at most")
    if not any(m["role"] == "user" for m in parsed.messages):
        raise DataError("it has no turn of the user")
    if any(m["role"] == "assistant" and {"type": "image"} in m["content"] for m in parsed.messages):
        raise DataError("it has a picture in a turn of the assistant")
    return parsed


# ----------------------------------------------------------------------------- the shapes of rows


def _messages(row: Mapping[str, Any]) -> Chat:
    sources: list[Any] = []
    pool = iter(_images(row))
    messages = [
        {"role": role, "content": [_part(part, sources, pool) for part in _content(message)]}
        for message, role in _turns(row["messages"], "role")
    ]
    if next(pool, None) is not None:
        raise DataError("it has more pictures than image parts")
    return Chat(messages=tuple(messages), sources=tuple(sources))


def _content(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise DataError("it has a message whose content is neither a text nor a list of parts")
    return content


def _part(part: Any, sources: list[Any], pool: Iterator[Any]) -> Message:
    """A part of a message; its picture, if it is one, is added to `sources`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind not in ("image", "image_url"):
        raise DataError(f"it has a part of the type {shown(kind, 40)}; text and image are read")
    given = next((part[n] for n in ("image_url", "image", "url", "path") if part.get(n)), None)
    source = next(pool, None) if given is None else given
    if source is None:
        raise DataError("it has an image part without an image")
    sources.append(source)
    return {"type": "image"}


def _conversations(row: Mapping[str, Any]) -> Chat:
    images = _images(row)
    turns: list[tuple[str, str]] = []
    for turn, role in _turns(row["conversations"], "from"):
        if not isinstance(text := turn.get("value"), str):
            raise DataError("it has a turn whose value is no text")
        turns.append((role, text))
    marks = sum(text.count("<image>") for _, text in turns)
    if not marks and images:  # the pictures go before the first question
        first = next((i for i, (role, _) in enumerate(turns) if role == "user"), None)
        if first is not None:
            turns[first] = ("user", "<image>" * len(images) + turns[first][1])
    elif marks != len(images):
        raise DataError(f"it has {marks} <image> marks and {len(images)} pictures")
    messages = tuple({"role": role, "content": _marked(text)} for role, text in turns)
    return Chat(messages=messages, sources=tuple(images))


def _marked(text: str) -> list[Message]:
    """The parts of a text in which pictures are marked."""
    if "<image>" not in text:
        return [{"type": "text", "text": text}]
    parts: list[Message] = []
    for number, piece in enumerate(MARK.split(text)):
        parts += [{"type": "image"}] * bool(number)
        parts += [{"type": "text", "text": piece}] * bool(piece)
    return parts


def _question(row: Mapping[str, Any]) -> Chat:
    """A row of a table: the question in VLMEvalKit's words, and its answer."""
    options = {letter: row[letter] for letter in string.ascii_uppercase if row.get(letter)}
    asked = str(row["question"])
    if options:
        asked = choice_prompt(asked, options, str(row.get("hint") or ""))
    named = next((row[name] for name in ("image", "image_path") if row.get(name)), None)
    sources = [] if named is None else [the_only_one(named, "it")]
    content = [*[{"type": "image"}] * len(sources), {"type": "text", "text": asked}]
    messages: list[Message] = [{"role": "user", "content": content}]
    if row.get("answer") is not None:
        answer = {"type": "text", "text": str(row["answer"])}
        messages.append({"role": "assistant", "content": [answer]})
    return Chat(messages=tuple(messages), sources=tuple(sources))


def _text(row: Mapping[str, Any]) -> str:
    text = row["text"]
    if not isinstance(text, str) or not text.strip():
        raise DataError("its text is empty, or no text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError("its text holds half a character (a lone surrogate)") from None
    return text


_SHAPES: dict[str, Callable[[Mapping[str, Any]], Chat | str]] = {
    "messages": _messages,
    "conversations": _conversations,
    "question": _question,
    "text": _text,
}


def _turns(turns: Any, key: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Every turn with its role, as chat templates call it."""
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError("its turns are no list of objects")
    for turn in turns:
        role = turn.get(key)
        if not isinstance(role, str) or role not in ROLES:
            raise DataError(f"it has a turn of {shown(role, 40)}; known are {', '.join(ROLES)}")
        yield turn, ROLES[role]


def _images(row: Mapping[str, Any]) -> list[Any]:
    given = row.get("image") or row.get("images") or []
    return list(given) if isinstance(given, list) else [given]
