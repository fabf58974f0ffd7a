"""Tokenizers of the kinds that models have, trained here, in OpenVINO: `make test-openvino`."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.integrations.openvino_tokenizer import write_tokenizer

pytestmark = pytest.mark.skipif(
    find_spec("openvino_tokenizers") is None,
    reason="openvino_tokenizers is not installed: make test-openvino",
)
TEXT = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
SPECIAL = ["<unk>", "<s>", "</s>"]


def wrapped(tokenizer):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def byte_level(decoder=None):
    """As of GPT-2, SmolLM2, Qwen and Llama 3."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoder or decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    return wrapped(made)


def byte_fallback():
    """As of Llama 2, Mistral, Vicuna and LLaVA-1.5."""
    made = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence(spaces)
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    letters = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL + letters, limit_alphabet=60, show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    saved = json.loads(made.to_str())  # bytes are ordinary tokens
    saved["added_tokens"] = [t for t in saved["added_tokens"] if t["content"] in SPECIAL]
    made = Tokenizer.from_str(json.dumps(saved))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    return wrapped(made)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_ids_and_texts_are_those_of_transformers(make, tmp_path):
    import openvino

    tokenizer = make()
    write_tokenizer(tokenizer, tmp_path)  # which compares mixed text
    encode = openvino.compile_model(tmp_path / "openvino_tokenizer.xml", "CPU")
    decode = openvino.compile_model(tmp_path / "openvino_detokenizer.xml", "CPU")
    for line in filter(None, TEXT.splitlines()[:40]):
        ids = encode([line])["input_ids"]
        assert ids[0].tolist() == tokenizer(line).input_ids
        assert decode(ids)[0][0] == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_a_decoder_that_openvino_lacks_is_refused(tmp_path):
    """transformers makes it of a GGUF file."""
    tokenizer = byte_level(decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()]))
    with pytest.raises(UnsupportedModelError, match="openvino_tokenizers cannot convert"):
        write_tokenizer(tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())
