"""llama.cpp's names of how byte-level BPE tokenizers split text before they merge bytes.

A name is found by behaviour: the tokenizer must split a probing text exactly as the pre-tokenizer
that the name stands for. Two tokenizers that write the same rule in other words have one name.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hipp_ext.errors import UnsupportedModelError

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{DIGITS}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_LLAMA3 = f"{_CONTRACTION}|{_WORDS.replace('{DIGITS}', '{1,3}')}"
_QWEN2 = f"{_CONTRACTION}|{_WORDS.replace('{DIGITS}', '')}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_MARKS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
_TEKKEN = rf"{_CASED % ('', '')}|\p{{N}}|{_MARKS}"
_GPT4O = rf"{_CASED % (f'{_CONTRACTION}?', f'{_CONTRACTION}?')}|\p{{N}}{{1,3}}|{_MARKS}"


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """A name of llama.cpp and what it stands for.

    Attributes:
        make: returns the same pre-tokenizer of the library tokenizers.
        whole_words: whether a piece that is a token is taken without merging (ignore_merges).
    """

    make: Callable[[Any], Any]
    whole_words: bool = False


def _split(pattern: str) -> Callable[[Any], Any]:
    def make(library: Any) -> Any:
        from tokenizers import Regex

        return library.Sequence(
            [
                library.Split(Regex(pattern), behavior="isolated", invert=False),
                library.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    return make


def _gpt2(library: Any) -> Any:
    return library.ByteLevel(add_prefix_space=False)


def _smollm(library: Any) -> Any:
    return library.Sequence([library.Digits(individual_digits=True), _gpt2(library)])


# Source: src/llama-vocab.cpp, llama.cpp 75dc8f6, and the tokenizers that it quotes.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(make=_gpt2),
    "smollm": PreTokenizer(make=_smollm),
    "llama-bpe": PreTokenizer(make=_split(_LLAMA3), whole_words=True),
    "smaug-bpe": PreTokenizer(make=_split(_LLAMA3)),
    "qwen2": PreTokenizer(make=_split(_QWEN2)),
    "tekken": PreTokenizer(make=_split(_TEKKEN), whole_words=True),
    "gpt-4o": PreTokenizer(make=_split(_GPT4O)),
}

# Every case in which the patterns above differ, and what else a text can hold.
PROBE = (
    "Hello world, it's WE'LL they're I'D 'tis x'S\n\n  indented\tby tabs\r\n   \n"
    "1 12 123 1234 12345678 3.14 v2.0 x86_64 \u0663\u0664\u0665 \u00bd\u00b2 IV\u2167 "
    "camelCase HTMLParser getURL2 \u00c9cole \u00d1and\u00fa na\u00efve stra\u00dfe \u01c5abc "
    "e\u0301a\u0308 \u0939\u093f\u0928\u094d\u0926\u0940 \u4f60\u597d\uff0c\u4e16\u754c\u3002 "
    "\u6771\u4eac123 \u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4 \u041f\u0440\u0438\u0432"
    "\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \U0001f600\U0001f44d\U0001f3fd \u2764\ufe0f "
    "def f(a, b):\n\treturn a[0]/b  # why?!\n\n\nhttps://a.b/c?d=e&f=1 //\n/* x */ <b>$5.00</b> "
    "a\u00a0b\u3000c ...!!! --- ''' \"q\" (a) {b} [c]   end  "
)


@functools.cache
def _pieces(name: str) -> tuple[Any, ...]:
    from tokenizers import pre_tokenizers

    return tuple(PRE_TOKENIZERS[name].make(pre_tokenizers).pre_tokenize_str(PROBE))


def pre_tokenizer_name(backend: Any, whole_words: bool) -> str:
    """llama.cpp's name of the pre-tokenizer of a byte-level BPE tokenizer.

    Args:
        backend: a tokenizers.Tokenizer.
        whole_words: whether it takes a piece that is a token without merging (ignore_merges).

    Raises:
        UnsupportedModelError: llama.cpp's names that are known here stand for none like it.
    """
    found = tuple(backend.pre_tokenizer.pre_tokenize_str(PROBE))
    for name, known in PRE_TOKENIZERS.items():
        if known.whole_words == whole_words and _pieces(name) == found:
            return name
    raise UnsupportedModelError(
        f"The tokenizer splits text by {backend.pre_tokenizer!r}, ignore_merges={whole_words}, "
        f"which is none of {', '.join(PRE_TOKENIZERS)}. If a GGUF file of the unpruned model "
        "exists, take the tokenizer from it: --tokenizer-from FILE."
    )
