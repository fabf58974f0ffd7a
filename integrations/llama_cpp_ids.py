"""Whether llama.cpp makes the same token ids of a text as transformers; asked of llama.cpp."""

import json
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.files.temporaries import write_errors
from hipp_ext.integrations.llama_cpp_ask import NO_LLAMA_CPP
from hipp_ext.integrations.llama_cpp_file import Entry, write_gguf
from hipp_ext.integrations.llama_cpp_pretokenizers import PROBE

_WIDTH = 32
_MOST_WORDS, _MOST_MARKS = 1000, 20  # that are compared
TEXTS = (
    PROBE,
    "The quick brown fox jumps over the lazy dog. 0 1 22 333 4444 55555",
    'import os\nfor i in range(10):\n    if i % 2 == 0:\n        print(f"{i}")\n',
    "\u6625\u7720\u4e0d\u89c9\u6653\uff0c\u5904\u5904\u95fb\u557c\u9e1f\u3002\u3072\u3089\u304c"
    "\u306a \uac00\ub098\ub2e4",
    "\U0001f1ea\U0001f1fa \U0001f469\u200d\U0001f4bb caf\u00e9 \u201cquotes\u201d \u2014 \u2026",
    "a  b   c    d\t\te \n f\n\n\ng\n",
)
LEADING = (" one space", "   three spaces", "\n line")
DECOMPOSED = "e\u0301 a\u0308 o\u0302"
NOT_COMPARED = (
    "Token ids were not compared with llama.cpp's: xllamacpp cannot be imported here (pip install "
    "xllamacpp)."
)

UNKNOWN_WORDS = (
    "The tokenizer has whole words: llama.cpp finds a known word inside an unknown one, where "
    "transformers has one unknown word."
)

Ids = Mapping[tuple[str, bool], list[int]]  # of a text, with or without special tokens around it


def compare_ids(tokenizer: Any, rows: int, add: Callable[[Any], None]) -> list[str]:
    """What a user must know of how llama.cpp tokenizes, by comparison with `tokenizer`.

    A file of the tokenizer alone, with next to no weights, is given to llama.cpp. Letters, digits,
    code, CJK, emoji and runs of spaces must get the same ids, and every special token its own; what
    differs only beside special tokens or behind leading spaces is told.

    Args:
        tokenizer: a tokenizer of transformers.
        rows: number of tokens of the model.
        add: adds the tokenizer's fields to a gguf.GGUFWriter.

    Returns:
        Notes; without xllamacpp, one that says that nothing was compared.

    Raises:
        UnsupportedModelError: ids differ, or llama.cpp refuses the tokenizer.
    """
    specials = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    equal = [(unicodedata.normalize("NFC", text), False) for text in TEXTS]
    equal += [(token, False) for token in specials] + [(TEXTS[1], True)]
    beside = {token: (f"one {token} two", f"{token}x") for token in specials}
    others = [*LEADING, DECOMPOSED, *(text for texts in beside.values() for text in texts)]
    ids = _compared(tokenizer, rows, add, equal, others)
    return [NOT_COMPARED] if ids is None else list(_notes(tokenizer, ids, beside))


def compare_words(tokenizer: Any, rows: int, add: Callable[[Any], None]) -> list[str]:
    """The same for a tokenizer of whole words: texts of words that it knows are compared, of all or
    of some `_MOST_WORDS` evenly spaced ones, each before every mark.

    Arguments, result and errors are those of `compare_ids`.
    """
    known = tokenizer.get_vocab()
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    every = [word for word in sorted(known) if word not in special]
    marks = [word for word in every if not any(map(str.isalnum, word))][:_MOST_MARKS]
    words = every[:: 1 + len(every) // _MOST_WORDS]
    texts = [" ".join(words), "\n".join(reversed(words)), *special]
    texts += ["  ".join(f"{word}{mark}" for word in words) for mark in marks]
    equal = [(text, False) for text in texts] + [(" ".join(words), True)]
    ids = _compared(tokenizer, rows, add, equal)
    return [UNKNOWN_WORDS, *([NOT_COMPARED] if ids is None else [])]


def _compared(
    tokenizer: Any,
    rows: int,
    add: Callable[[Any], None],
    equal: Sequence[tuple[str, bool]],
    others: Sequence[str] = (),
) -> Ids | None:
    """llama.cpp's ids of texts; None without llama.cpp. UnsupportedModelError if those of `equal`
    differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.gguf"
        with write_errors(path):
            _write_tiny(path, rows, add)
        ids = _ask(path, [*equal, *((text, False) for text in others)])
    for text, special in equal if ids is not None else ():
        ours = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        _check(text, ours, ids[text, special])  # type: ignore[index]
    return ids


def _check(text: str, expected: list[int], found: list[int]) -> None:
    if expected == found:
        return
    pairs = enumerate(zip([*expected, None], [*found, None], strict=False))
    place, (ours, theirs) = next(item for item in pairs if item[1][0] != item[1][1])
    raise UnsupportedModelError(
        f"llama.cpp would tokenize {text[:60]!r} otherwise than transformers: token {place} would "
        f"be {theirs} and is {ours}. If a GGUF file of the unpruned model exists, its tokenizer "
        "can be taken: --tokenizer-from FILE."
    )


def _notes(tokenizer: Any, ids: Ids, beside: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    def differ(*texts: str) -> bool:
        return any(
            tokenizer(text, add_special_tokens=False)["input_ids"] != ids[text, False]
            for text in texts
        )

    if odd := [text for text in LEADING if differ(text)]:
        yield f"llama.cpp tokenizes a text that begins with spaces otherwise ({odd[0]!r})."
    if differ(DECOMPOSED):
        yield "llama.cpp tokenizes letters with separate accents (not in Unicode's NFC) otherwise."
    if odd := [token for token, texts in beside.items() if differ(*texts)]:
        yield (
            f"llama.cpp tokenizes text beside {len(odd)} of {len(beside)} special tokens "
            f"otherwise ({', '.join(odd[:3])}): it puts a space behind them, or keeps one that "
            "transformers takes away."
        )


def _ask(path: Path, asked: Sequence[tuple[str, bool]]) -> Ids | None:
    """llama.cpp's ids; None without llama.cpp."""
    done = subprocess.run(
        [sys.executable, "-m", "hipp_ext.integrations.llama_cpp_ask"],
        input=json.dumps({"file": str(path), "texts": asked}),
        capture_output=True,
        text=True,
    )
    if done.returncode == NO_LLAMA_CPP:
        return None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = next((line for line in lines if "error" in line), lines[-1] if lines else "")
        raise UnsupportedModelError(
            f"llama.cpp refuses the tokenizer (exit code {done.returncode}): {why}"
        )
    return dict(zip(asked, json.loads(done.stdout), strict=True))


def _write_tiny(path: Path, rows: int, add: Callable[[Any], None]) -> None:
    def fields(writer: Any) -> None:
        writer.add_block_count(1)
        writer.add_context_length(_WIDTH)
        writer.add_embedding_length(_WIDTH)
        writer.add_feed_forward_length(_WIDTH)
        writer.add_head_count(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(rows)
        add(writer)

    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (rows, _WIDTH), "output_norm": (_WIDTH,)}
    shapes |= {f"blk.0.{name}": (_WIDTH, _WIDTH) for name in square}
    shapes |= {f"blk.0.{name}": (_WIDTH,) for name in ("attn_norm", "ffn_norm")}
    made = [
        Entry(name=f"{name}.weight", shape=shape, read=lambda s=shape: torch.zeros(s))
        for name, shape in shapes.items()
    ]
    with path.open("wb") as file:
        write_gguf(file, "llama", fields, made, "f16")
