"""The tokenizer of another GGUF file, such as one of the unpruned model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipp_ext.errors import CheckpointError
from hipp_ext.files.untrusted import open_plain
from hipp_ext.integrations.llama_cpp_file import load_gguf
from hipp_ext.integrations.llama_cpp_tokenizer import UNUSED

_PREFIX = "tokenizer."
_LIST = "tokenizer.ggml.tokens"
_BY_TOKEN = {"tokenizer.ggml.token_type": UNUSED, "tokenizer.ggml.scores": 0.0}
_LARGEST = 1 << 42  # bytes


@dataclass(frozen=True, kw_only=True)
class _Field:
    value: Any
    kind: Any
    part: Any


def copied_tokenizer(path: str | Path, rows: int) -> Callable[[Any], None]:
    """A function that adds the tokenizer of a GGUF file to a gguf.GGUFWriter.

    Args:
        path: the file.
        rows: rows of the model's embedding; those that no token has become unused tokens.

    Raises:
        DataError: there is no such file.
        CheckpointError: it is no GGUF file, is damaged, or has another number of tokens.
    """
    open_plain(path, _LARGEST, "GGUF file").close()
    fields = _read(path)
    tokens = fields.get(_LIST)
    count = len(tokens.value) if tokens is not None else 0
    if not 0 < count <= rows:
        raise CheckpointError(
            f"{path} has a tokenizer of {count} tokens, and the model {rows} rows of embeddings: "
            "give the GGUF file of the same model before it was pruned."
        )
    fillers: Mapping[str, Any] = {_LIST: None} | _BY_TOKEN

    def add(writer: Any) -> None:
        for name, field in fields.items():
            value = field.value
            if name in fillers:
                fill = [f"[PAD{i}]" if name == _LIST else fillers[name] for i in range(count, rows)]
                value = [*value[:count], *fill]
            writer.add_key_value(name, value, field.kind, field.part)

    return add


def _read(path: str | Path) -> dict[str, _Field]:
    gguf = load_gguf()
    array = gguf.GGUFValueType.ARRAY
    try:
        reader = gguf.GGUFReader(path)
        return {
            name: _Field(
                value=field.contents(),
                kind=field.types[0],
                part=field.types[-1] if field.types[0] == array else None,
            )
            for name, field in reader.fields.items()
            if name.startswith(_PREFIX)
        }
    except Exception as error:  # it checks little, and numpy raises several kinds
        raise CheckpointError(f"{path} is no GGUF file, or is damaged: {error!r}") from error
