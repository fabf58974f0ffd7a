"""The kinds of tokenizers that llama.cpp and transformers both have: three of subwords, and one of
whole words.
"""

import base64
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.integrations.llama_cpp_pretokenizers import pre_tokenizer_name

ADVICE = (
    "If a GGUF file of the unpruned model exists, take the tokenizer from it: --tokenizer-from "
    "FILE."
)
_SPACE = "\u2581"  # SentencePiece's sign for a space
_ODD_MERGES = 0.01  # of the pairs that make a token, those without a merge
_NO_MERGE = -1e6  # score of tokens that no merge makes


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How a tokenizer splits and joins.

    Attributes:
        model: llama.cpp's name of the kind: "gpt2", "llama" or "t5".
        pre: llama.cpp's name of the pre-tokenizer.
        merges: pairs of pieces, best first, of byte-level BPE.
        scores: by token, of the others.
        lowest: score of a token that has none.
        flags: fields that are true or false, such as "add_space_prefix".
        charsmap: SentencePiece's compiled normalisation.
        bytes: whether tokens such as <0x0A> stand for bytes.
        words: whether every token is a whole word or mark, and spaces are nothing.
    """

    model: str
    pre: str = "default"
    merges: Sequence[str] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    lowest: float = 0.0
    flags: Mapping[str, bool] = field(default_factory=dict)
    charsmap: bytes = b""
    bytes: bool = False
    words: bool = False


def find_kind(backend: Any, spec: Mapping[str, Any]) -> Kind:
    """The kind of a tokenizer.

    Args:
        backend: a tokenizers.Tokenizer.
        spec: what it writes of itself, as JSON.

    Raises:
        UnsupportedModelError: llama.cpp has no such tokenizer.
    """
    model, steps = spec["model"], _steps(spec["normalizer"], spec["pre_tokenizer"])
    if model["type"] == "BPE" and any(step["type"] == "ByteLevel" for step in steps):
        return _byte_level(backend, model, _steps(spec["normalizer"]))
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return _sentencepiece(model, steps)
    if model["type"] == "Unigram" and not model.get("byte_fallback"):
        return _unigram(model, steps)
    if model["type"] == "WordLevel" and _only_splits(steps):
        # llama.cpp looks for tokens of the user first, the longest ones before others. What is left
        # between them is spaces, of which unigram models can make nothing.
        flags = {"add_space_prefix": False, "remove_extra_whitespaces": True}
        return Kind(model="t5", words=True, flags=flags, charsmap=_as_spaces("\t\n\v\f\r"))
    fallback = " with bytes for unknown characters" if model.get("byte_fallback") else ""
    raise UnsupportedModelError(
        f"The tokenizer is a {model['type']} model{fallback} behind "
        f"{', '.join(step['type'] for step in steps) or 'no other step'}; byte-level BPE, "
        "SentencePiece BPE with bytes for unknown characters, unigram models, and whole words "
        "between spaces can be written. "
        f"{ADVICE}"
    )


def is_byte(token: str) -> bool:
    """Whether a token of SentencePiece stands for a byte."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _steps(*parts: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Normalizers and pre-tokenizers, one after another."""
    found: list[Mapping[str, Any]] = []
    rest = list(parts)
    while rest:
        step = rest.pop(0)
        if step is not None and step["type"] == "Sequence":
            rest = [*(step.get("normalizers") or step.get("pretokenizers") or ()), *rest]
        elif step is not None:
            found.append(step)
    return found


def _only_splits(steps: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a text is split, spaces are dropped, and nothing else is done."""
    kinds = {step["type"] for step in steps}
    return bool(kinds & {"Whitespace", "WhitespaceSplit"}) and kinds <= {
        "Punctuation",
        "Split",
        "Whitespace",
        "WhitespaceSplit",
    }


def _as_spaces(characters: str) -> bytes:
    """SentencePiece's compiled normalisation that makes each of these ASCII characters a space.

    A double array (darts-clone): the root's children stand at 256 + character; each of them is the
    end of a key, whose value, the place of its replacement, stands 256 units behind it.
    """
    units = [0] * 768
    units[0] = 256 << 10
    for character in characters.encode():
        units[256 + character] = (256 ^ 512) << 10 | 1 << 8 | character
    array = struct.pack(f"<{len(units)}I", *units)  # the values are 0: there is one replacement
    return struct.pack("<I", len(array)) + array + b" \0"


def _byte_level(
    backend: Any, model: Mapping[str, Any], normalizers: Sequence[Mapping[str, Any]]
) -> Kind:
    # llama.cpp normalises nothing; that matters to few texts, and compare_ids tells of it.
    odd = [step["type"] for step in normalizers if step["type"] != "NFC"]
    odd += [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if odd:
        raise UnsupportedModelError(
            f"The tokenizer is byte-level BPE with {', '.join(odd)}, which llama.cpp does not "
            f"have. {ADVICE}"
        )
    pre = pre_tokenizer_name(backend, bool(model.get("ignore_merges")))
    return Kind(model="gpt2", pre=pre, merges=[" ".join(pair) for pair in _pairs(model)])


def _sentencepiece(model: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> Kind:
    """Scores that have llama.cpp join pieces in the order of the merges.

    llama.cpp joins any two pieces that make a token, the best token first; so does SentencePiece,
    of whose vocabulary transformers makes all such pairs merges.
    """
    prefix = _space_prefix(steps)
    merges = _pairs(model)
    rank: dict[str, int] = {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    vocab, known = model["vocab"], set(merges)
    pairs = [
        (token[:i], token[i:])
        for token in vocab
        if not is_byte(token)
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    odd = sum(pair not in known for pair in pairs)
    if odd > _ODD_MERGES * len(pairs):
        raise UnsupportedModelError(
            f"The tokenizer is BPE, but not SentencePiece's: {odd:,} of {len(pairs):,} pairs that "
            f"make a token are no merges, and llama.cpp would join them. {ADVICE}"
        )
    return Kind(
        model="llama",
        scores={token: -float(place) for token, place in rank.items()},
        lowest=_NO_MERGE,
        flags={"add_space_prefix": prefix},
        bytes=True,
    )


def _unigram(model: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> Kind:
    charsmap, squeezes, rest = b"", False, []
    for step in steps:
        kind = step["type"]
        runs = kind == "Replace" and "{2,}" in step["pattern"].get("Regex", "")
        if kind == "Precompiled":
            charsmap = base64.b64decode(step["precompiled_charsmap"])
        elif runs or kind in ("Strip", "WhitespaceSplit"):
            squeezes = True
        else:
            rest.append(step)
    return Kind(
        model="t5",
        scores={token: float(score) for token, score in model["vocab"]},
        charsmap=charsmap,
        flags={"add_space_prefix": _space_prefix(rest), "remove_extra_whitespaces": squeezes},
    )


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges; older files have both pieces in one text."""
    found = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
    return [(left, right) for left, right in found]


def _space_prefix(steps: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a text gets a space in front.

    Raises:
        UnsupportedModelError: a step is none of SentencePiece's.
    """
    prefix = False
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == _SPACE:
            prefix = True
        elif kind == "Metaspace" and step.get("replacement") == _SPACE:
            prefix = step.get("prepend_scheme", "always") != "never"
        elif not (kind == "Replace" and step["content"] == _SPACE):
            raise UnsupportedModelError(
                f"The tokenizer has a step {kind}, which SentencePiece does not have. {ADVICE}"
            )
    return prefix
