"""A row of a user's file -> a chat: messages, and where its pictures are.

Rows may be anybody's. A picture is read from the row itself or from a file below the image folder;
nothing is fetched.
"""

import base64
import binascii
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipp_ext.calibration.encoding import Message
from hipp_ext.errors import DataError
from hipp_ext.files.untrusted import (
    PICTURE_BYTES,
    is_below,
    read_picture,
    rgb_picture,
    shown,
    the_only_one,
)

if TYPE_CHECKING:
    from PIL import Image

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
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)


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
    return parsed


# ----------------------------------------------------------------------------- the shapes of rows


def _messages(row: Mapping[str, Any]) -> Chat:
    sources: list[Any] = []
    pool = iter(_images(row))
    messages = [
        {"role": role, "content": [_part(part, sources, pool) for part in _content(message)]}
        for message, role in _turns(row["messages"], "role")
    ]
    return _chat(messages, sources, pool)


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
    turns = [(role, turn.get("value")) for turn, role in _turns(row["conversations"], "from")]
    if not all(isinstance(text, str) for _, text in turns):
        raise DataError("it has a turn whose value is no text")
    marks = sum(text.count("<image>") for _, text in turns)
    if not marks and images:  # the pictures go before the first question
        first = next((i for i, (role, _) in enumerate(turns) if role == "user"), None)
        if first is not None:
            turns[first] = ("user", "<image>" * len(images) + turns[first][1])
    elif marks != len(images):
        raise DataError(f"it has {marks} <image> marks and {len(images)} pictures")
    messages = [{"role": role, "content": _marked(text)} for role, text in turns]
    return _chat(messages, images, iter(()))


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
    column = next((name for name in ("image", "image_path") if row.get(name)), None)
    sources = []
    if column is not None:
        sources = [the_only_one(row[column], "it")]
    content = [*[{"type": "image"}] * len(sources), {"type": "text", "text": asked}]
    messages: list[Message] = [{"role": "user", "content": content}]
    if row.get("answer") is not None:
        answer = {"type": "text", "text": str(row["answer"])}
        messages.append({"role": "assistant", "content": [answer]})
    return _chat(messages, sources, iter(()))


def choice_prompt(question: str, options: Mapping[str, object], hint: str = "") -> str:
    """VLMEvalKit's multiple-choice prompt: hint, question, lettered options, request to choose."""
    lines = [f"Hint: {hint}"] * bool(hint) + [f"Question: {question}", "Options:"]
    lines += [f"{letter}. {text}" for letter, text in options.items()]
    return "\n".join(lines) + "\nPlease select the correct answer from the options above. \n"


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


def _chat(messages: list[Message], sources: Sequence[Any], unused: Iterator[Any]) -> Chat:
    if next(unused, None) is not None:
        raise DataError("it has more pictures than image parts")
    for message in messages:
        if message["role"] == "assistant" and {"type": "image"} in message["content"]:
            raise DataError("it has a picture in a turn of the assistant")
    return Chat(messages=tuple(messages), sources=tuple(sources))


# --------------------------------------------------------------------------------------- pictures


def read_source(source: Any, folder: Path) -> "Image.Image":
    """The picture that a source names, RGB.

    Args:
        source: a path below `folder`, a data: URL, {"url": either}, {"base64": text}, or
            {"bytes": ..., "path": ...} as `datasets` stores pictures.
        folder: where pictures are.

    Raises:
        DataError: there is no such picture, it is elsewhere, or it cannot be decoded.
    """
    if isinstance(source, Mapping):
        if isinstance(source.get("bytes"), bytes):
            return rgb_picture(source["bytes"])
        if isinstance(source.get("base64"), str):
            return _decoded(the_only_one(source["base64"], "it"))
        source = source.get("url") or source.get("path")
    if not isinstance(source, str):
        raise DataError(f"its picture is a {type(source).__name__}, and a path is needed")
    if beginning := DATA_URL.match(source):
        return _decoded(source[beginning.end() :])
    if re.match(r"[a-z][a-z0-9+.-]+:", source, re.IGNORECASE):
        raise DataError(
            f"its picture is at {shown(source, 80)}, and nothing is fetched: download it, and give "
            "its path below the image folder"
        )
    if not is_below(folder / source, folder):
        raise DataError(f"its picture {shown(source, 80)} is not below the image folder")
    return read_picture(folder / source)


def _decoded(text: Any) -> "Image.Image":
    if not isinstance(text, str):
        raise DataError("its picture is no base64 text")
    if 3 * len(text) // 4 > PICTURE_BYTES:
        raise DataError(f"its picture has more than {PICTURE_BYTES:,} bytes")
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise DataError("its picture is no base64 text") from None
    try:
        return rgb_picture(data)
    except DataError as error:
        raise DataError(f"its picture cannot be read: {error}") from None
