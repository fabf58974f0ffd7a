"""Tokenizers as GGUF fields: llama.cpp itself must make the same ids of the same text."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from llama_cpp_runtime import tiny_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer, T5Tokenizer

from hipp_ext.errors import CheckpointError, UnsupportedModelError
from hipp_ext.integrations.llama_cpp_ids import (
    NOT_COMPARED,
    TEXTS,
    UNKNOWN_WORDS,
    compare_ids,
    compare_words,
)
from hipp_ext.integrations.llama_cpp_pretokenizers import PRE_TOKENIZERS, PROBE
from hipp_ext.integrations.llama_cpp_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    load_tokenizer,
    make_vocabulary,
)

CORPUS = [PROBE, *TEXTS, Path(__file__).read_text()]
ROWS = 1000


def byte_level(make: Callable[[Any], Any], whole_words: bool = False) -> Tokenizer:
    """A byte-level BPE tokenizer, trained here."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer = make(pre_tokenizers)
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|start|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|start|>"
    )


def sentencepieces(folder: Path, **options: Any) -> Path:
    """A SentencePiece model, trained here."""
    (folder / "corpus.txt").write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "trained"),
        vocab_size=600,
        minloglevel=2,
        **options,
    )
    return folder / "trained.model"


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_byte_level_bpe_by_every_name(name):
    known = PRE_TOKENIZERS[name]
    tokenizer = wrapped(byte_level(known.make, known.whole_words))
    tokenizer.add_tokens(["<|tool|>"])
    vocabulary = make_vocabulary(tokenizer, ROWS, [0])
    assert (vocabulary.kind.model, vocabulary.kind.pre) == ("gpt2", name)
    assert compare_ids(tokenizer, ROWS, vocabulary.add) == []
    count = len(tokenizer)
    assert [vocabulary.types[i] for i in (0, 2, count - 1, count)] == [
        CONTROL,
        NORMAL,
        USER_DEFINED,
        UNUSED,
    ]
    assert len(vocabulary.tokens) == len(set(vocabulary.tokens)) == ROWS


def test_a_wrong_name_is_found_out_by_llama_cpp():
    tokenizer = wrapped(byte_level(PRE_TOKENIZERS["gpt-2"].make))
    right = make_vocabulary(tokenizer, ROWS, [0])
    wrong = replace(right, kind=replace(right.kind, pre="qwen2"))
    with pytest.raises(UnsupportedModelError, match="otherwise than transformers: token .* would"):
        compare_ids(tokenizer, ROWS, wrong.add)


def test_a_name_that_llama_cpp_does_not_have():
    tokenizer = wrapped(byte_level(PRE_TOKENIZERS["gpt-2"].make))
    vocabulary = make_vocabulary(tokenizer, ROWS, [0])
    wrong = replace(vocabulary, kind=replace(vocabulary.kind, pre="nobody"))
    with pytest.raises(
        UnsupportedModelError,
        match="llama.cpp refuses the tokenizer.*unknown pre-tokenizer type: 'nobody'",
    ):
        compare_ids(tokenizer, ROWS, wrong.add)


def test_the_rule_of_transformers_own_qwen_has_its_name():
    trained = json.loads(byte_level(PRE_TOKENIZERS["qwen2"].make).to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=trained["vocab"], merges=merges)
    vocabulary = make_vocabulary(tokenizer, ROWS, [0])
    (note,) = compare_ids(tokenizer, ROWS, vocabulary.add)
    assert vocabulary.kind.pre == "qwen2" and "NFC" in note


def _dashes(library: Any) -> Any:
    parts = [library.Split(Regex("-+"), "isolated"), library.ByteLevel(add_prefix_space=False)]
    return library.Sequence(parts)


def test_an_unknown_rule_is_named():
    with pytest.raises(UnsupportedModelError, match=r"splits text by .*Split.*--tokenizer-from"):
        make_vocabulary(wrapped(byte_level(_dashes)), ROWS, [0])


def test_normalisation_of_bytes_is_refused():
    tokenizer = byte_level(PRE_TOKENIZERS["gpt-2"].make)
    tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UnsupportedModelError, match="byte-level BPE with Lowercase"):
        make_vocabulary(wrapped(tokenizer), ROWS, [0])


def whole_words(*words: str) -> PreTrainedTokenizerFast:
    known = ["<unk>", "<|start|>", "<|end|>", *words]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    rule = Regex(r"[A-D]\.|\w+|[^\w\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(rule, "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|end|>", bos_token="<|start|>"
    )


def test_whole_words_between_spaces():
    """Words that begin others, marks that stand in a token and alone, all kinds of spaces."""
    tokenizer = whole_words("the", "then", "A", "A.", ".", "?", "cat", "cats")
    vocabulary = make_vocabulary(tokenizer, 20, [2])
    assert compare_words(tokenizer, 20, vocabulary.add) == [UNKNOWN_WORDS]
    kept = replace(vocabulary, kind=replace(vocabulary.kind, charsmap=b""))  # ends of lines stay
    with pytest.raises(UnsupportedModelError, match="otherwise than transformers: token 1"):
        compare_words(tokenizer, 20, kept.add)
    # Within "the-cat?" the rule of transformers finds no token, and llama.cpp two.
    joined = whole_words("the", "cat", "the-cat", "-")
    with pytest.raises(UnsupportedModelError, match="otherwise than transformers"):
        compare_words(joined, 20, make_vocabulary(joined, 20, [2]).add)


def test_sentencepiece_bpe(tmp_path):
    """As Llama 2's: bytes for unknown characters, a space in front, a token of beginning."""
    trained = sentencepieces(
        tmp_path,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
    )
    (tmp_path / "model").mkdir()
    trained.rename(tmp_path / "model/tokenizer.model")
    tokenizer = LlamaTokenizer.from_pretrained(tmp_path / "model", add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vocabulary = make_vocabulary(tokenizer, ROWS, [2])
    assert (vocabulary.kind.model, vocabulary.bos, vocabulary.eos) == ("llama", True, False)
    assert [vocabulary.types[i] for i in (0, 1, 3, 300, 600)] == [
        UNKNOWN,
        CONTROL,
        BYTE,
        NORMAL,
        CONTROL,
    ]
    notes = compare_ids(tokenizer, ROWS, vocabulary.add)
    # transformers puts the space in front of a whole text, llama.cpp in front of every part of it.
    assert len(notes) == 2 and "begins with spaces" in notes[0] and "special tokens" in notes[1]


def test_sentencepiece_as_llama_2_wrote_it(tmp_path):
    """The space is put by a normalizer: the same in llama.cpp everywhere."""
    trained = sentencepieces(
        tmp_path,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    (tmp_path / "model").mkdir()
    trained.rename(tmp_path / "model/tokenizer.model")
    tokenizer = LlamaTokenizer.from_pretrained(tmp_path / "model")
    backend = tokenizer.backend_tokenizer
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    vocabulary = make_vocabulary(tokenizer, ROWS, [2])
    assert vocabulary.kind.flags == {"add_space_prefix": True}
    assert compare_ids(tokenizer, ROWS, vocabulary.add) == []


def test_merges_that_are_not_sentencepiece_s(tmp_path):
    """Of every pair that makes a token llama.cpp joins; a trainer that chose merges does not."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<|end|>", "<|start|>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    with pytest.raises(UnsupportedModelError, match="not SentencePiece's: .* are no merges"):
        make_vocabulary(wrapped(tokenizer), ROWS, [1])


@pytest.mark.parametrize("scheme", ["never", "always"])
def test_unigram(scheme):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    vocabulary = make_vocabulary(tokenizer, 97, [2])
    assert (vocabulary.kind.model, vocabulary.types[0]) == ("t5", UNKNOWN)
    assert bool(compare_ids(tokenizer, 97, vocabulary.add)) == (scheme == "always")


def test_unigram_with_sentencepiece_s_normalisation(tmp_path):
    trained = sentencepieces(
        tmp_path, model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1
    )
    (tmp_path / "model").mkdir()
    trained.rename(tmp_path / "model/spiece.model")
    tokenizer = T5Tokenizer.from_pretrained(tmp_path / "model", extra_ids=0)
    vocabulary = make_vocabulary(tokenizer, ROWS, [1])
    assert (vocabulary.kind.model, vocabulary.bos, vocabulary.eos) == ("t5", False, True)
    assert len(vocabulary.kind.charsmap) > 1000
    assert compare_ids(tokenizer, ROWS, vocabulary.add) == []


def test_a_step_that_sentencepiece_does_not_have():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UnsupportedModelError, match="has a step Lowercase"):
        make_vocabulary(tokenizer, 97, [2])


def test_other_models_are_refused():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    with pytest.raises(UnsupportedModelError, match="WordPiece model behind BertPreTokenizer"):
        make_vocabulary(fast, 10, [0])


def test_other_tokens_around_a_text_are_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<a> $A", special_tokens=[("<a>", 3)]
    )
    with pytest.raises(UnsupportedModelError, match="only a token of beginning"):
        make_vocabulary(tokenizer, 97, [2])


def test_a_text_must_have_an_end():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(CheckpointError, match="eos_token_id"):
        make_vocabulary(tokenizer, 97, [])


def test_spaces_that_a_special_token_takes_are_told():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, special=True)], special_tokens=True)
    vocabulary = make_vocabulary(tokenizer, 97, [2])
    (note,) = compare_ids(tokenizer, 97, vocabulary.add)
    assert "beside 1 of 7 special tokens" in note and "<mask>" in note


def test_without_llama_cpp_a_note_says_that_nothing_was_compared(tmp_path, monkeypatch):
    """The process that asks llama.cpp finds a module that cannot be imported in its place."""
    (tmp_path / "xllamacpp.py").write_text("raise ImportError('built for another system')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    tokenizer = tiny_tokenizer()
    vocabulary = make_vocabulary(tokenizer, 97, [2])
    assert compare_ids(tokenizer, 97, vocabulary.add) == [NOT_COMPARED]


def test_a_crash_of_llama_cpp_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "xllamacpp.py").write_text("import os\nos.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    tokenizer = tiny_tokenizer()
    vocabulary = make_vocabulary(tokenizer, 97, [2])
    with pytest.raises(UnsupportedModelError, match=r"refuses the tokenizer \(exit code -6\)"):
        compare_ids(tokenizer, 97, vocabulary.add)


def test_a_damaged_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"')
    with pytest.raises(CheckpointError, match="could not be loaded"):
        load_tokenizer(tmp_path)


def test_a_chat_template_goes_along():
    class Writer:
        """Keeps what is added."""

        def __init__(self) -> None:
            self.added: dict[str, Any] = {}

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *values: self.added.__setitem__(name, values)

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    writer = Writer()
    make_vocabulary(tokenizer, 97, [2]).add(writer)
    assert writer.added["add_chat_template"] == ("{{ messages[0]['content'] }}",)
