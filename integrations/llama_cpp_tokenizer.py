"""A transformers tokenizer as llama.cpp's `tokenizer.ggml` fields."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipp_ext.errors import CheckpointError, UnsupportedModelError
from hipp_ext.integrations.llama_cpp_tokenizer_kinds import ADVICE, Kind, find_kind, is_byte

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What llama.cpp is told of a tokenizer.

    Attributes:
        kind: how it splits and joins.
        tokens: text of every token, by its id.
        types: NORMAL, ..., BYTE, by id.
        ids: "bos", "eos", "eot", "unk", "pad" -> id, for those there are.
        bos, eos: whether a text begins and ends with it.
        template: chat template, or named ones.
    """

    kind: Kind
    tokens: Sequence[str]
    types: Sequence[int]
    ids: Mapping[str, int]
    bos: bool
    eos: bool
    template: str | Mapping[str, str] | None = None

    def add(self, writer: Any) -> None:
        """Add the fields to a gguf.GGUFWriter."""
        kind = self.kind
        writer.add_tokenizer_model(kind.model)
        writer.add_tokenizer_pre(kind.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if kind.scores:
            writer.add_token_scores([kind.scores.get(token, kind.lowest) for token in self.tokens])
        if kind.merges:
            writer.add_token_merges(kind.merges)
        for name, value in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(value)
        writer.add_add_bos_token(self.bos)
        writer.add_add_eos_token(self.eos)
        for name, value in kind.flags.items():
            getattr(writer, f"add_{name}")(value)
        if kind.charsmap:
            writer.add_precompiled_charsmap(kind.charsmap)
        if isinstance(self.template, str):
            writer.add_chat_template(self.template)
        elif self.template:
            named = [{"name": k, "template": v} for k, v in self.template.items()]
            writer.add_chat_template(named)


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of a model folder; None where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    if not any((folder / name).is_file() for name in _FILES):
        return None
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        found.backend_tokenizer.to_str()
        return found
    except Exception as error:  # tokenizers raises bare ones for a damaged file
        raise CheckpointError(f"The tokenizer in {folder} could not be loaded: {error}") from error


def make_vocabulary(tokenizer: Any, rows: int, ends: Sequence[int]) -> Vocabulary:
    """What llama.cpp has to know of a transformers tokenizer.

    Args:
        tokenizer: a tokenizer of transformers.
        rows: rows of the model's embedding; those that no token has become unused tokens.
        ends: ids that end a generation, the most important first.

    Raises:
        UnsupportedModelError: llama.cpp has no such tokenizer.
        CheckpointError: it has more tokens than the model, or no token ends a text.
    """
    backend = tokenizer.backend_tokenizer
    spec = json.loads(backend.to_str())
    kind = find_kind(backend, spec)
    tokens = _tokens(tokenizer, rows)
    bos, eos = _added(tokenizer)
    return Vocabulary(
        kind=kind,
        tokens=tokens,
        types=_types(tokenizer, tokens, spec["added_tokens"], kind),
        ids=_ids(tokenizer, ends, rows),
        bos=bos,
        eos=eos,
        template=getattr(tokenizer, "chat_template", None),
    )


def _tokens(tokenizer: Any, rows: int) -> list[str]:
    """Texts of all tokens, by id; made up where no token has the id."""
    vocab = tokenizer.get_vocab()
    if (largest := max(vocab.values())) >= rows:
        raise CheckpointError(
            f"The tokenizer has a token {largest}, and the model {rows} rows of embeddings: it "
            "belongs to another model."
        )
    by_id = {number: token for token, number in vocab.items()}
    return [by_id.get(number) or _free(f"[PAD{number}]", vocab) for number in range(rows)]


def _free(name: str, taken: Mapping[str, int]) -> str:
    return name if name not in taken else _free(f"{name}_", taken)


def _types(
    tokenizer: Any, tokens: Sequence[str], added: Sequence[Mapping[str, Any]], kind: Kind
) -> list[int]:
    vocab = tokenizer.get_vocab()
    types = [
        UNUSED if token not in vocab else BYTE if kind.bytes and is_byte(token) else NORMAL
        for token in tokens
    ]
    if kind.words:
        types = [USER_DEFINED if own == NORMAL else own for own in types]
    for token in added:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    # Byte-level BPE knows every byte, and its token for what is unknown is an ordinary special one.
    if tokenizer.unk_token_id is not None and (kind.scores or kind.words):
        types[tokenizer.unk_token_id] = UNKNOWN
    return types


def _added(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts its bos token before a text, and its eos token behind it."""
    plain = tokenizer("a b", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a b")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for before in (False, True):
        for behind in (False, True):
            expected = [*([bos] if before else []), *plain, *([eos] if behind else [])]
            if whole == expected:
                return before, behind
    raise UnsupportedModelError(
        f"The tokenizer makes {whole} of a text of the ids {plain}: only a token of beginning "
        f"({bos}) and one of end ({eos}) can be written. {ADVICE}"
    )


def _ids(tokenizer: Any, ends: Sequence[int], rows: int) -> dict[str, int]:
    """The ids of special tokens; a second token that ends a generation is that of the turn."""
    own = tokenizer.eos_token_id
    ends = [number for number in ends if 0 <= number < rows] or ([] if own is None else [own])
    if not ends:
        raise CheckpointError(
            "Neither config.json, generation_config.json nor the tokenizer names a token that ends "
            "a text (eos_token_id), and llama.cpp would take another token for it."
        )
    found = {"eos": ends[0]}
    others = [number for number in ends[1:] if number != ends[0]]
    if others:
        found["eot"] = own if own in others else others[0]
    for name in ("bos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            found[name] = number
    return found
