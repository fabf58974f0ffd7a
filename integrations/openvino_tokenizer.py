"""A transformers tokenizer as OpenVINO graphs, compared with it before it is called good."""

from pathlib import Path
from typing import Any

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.integrations.openvino_host import load

# Letters of several scripts, digits, runs of spaces, contractions, marks and emoji.
TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "It's 2,024.50 euros -- don't you think?  Two  spaces,\n\nlines\tand a tab. ",
    "Grüße aus Köln, señor; où est l'été? Привет, мир! 你好，世界 こんにちは",
    'def f(x): return {"a": x**2, "b": [1, 2]}  # <image> 😀',
)


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write openvino_tokenizer.xml and openvino_detokenizer.xml to `folder`.

    Raises:
        UnsupportedModelError: openvino_tokenizers cannot convert it, or gives other ids or another
            text than the tokenizer does on mixed text.
        MissingExtraError: openvino_tokenizers is not installed.
    """
    openvino, tokenizers = load(), load("openvino_tokenizers")
    try:
        encode, decode = tokenizers.convert_tokenizer(
            tokenizer, with_detokenizer=True, skip_special_tokens=True
        )
    except Exception as error:  # it raises whatever its reader of tokenizer.json meets
        raise UnsupportedModelError(
            f"openvino_tokenizers cannot convert the {type(tokenizer).__name__} of the model: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    _compare(tokenizer, encode, decode)
    openvino.save_model(encode, folder / "openvino_tokenizer.xml")
    openvino.save_model(decode, folder / "openvino_detokenizer.xml")


def _compare(tokenizer: Any, encode: Any, decode: Any) -> None:
    encode, decode = (load().compile_model(graph, "CPU") for graph in (encode, decode))
    for text in TEXTS:
        wanted = tokenizer(text).input_ids
        ids = encode([text])["input_ids"]
        if ids[0].tolist() != wanted:
            raise UnsupportedModelError(
                f"openvino_tokenizers does not split text as the model's "
                f"{type(tokenizer).__name__} does: {text!r} becomes {ids[0].tolist()}, not "
                f"{wanted}."
            )
        back, before = decode(ids)[0][0], tokenizer.decode(wanted, skip_special_tokens=True)
        if back != before:
            raise UnsupportedModelError(
                f"openvino_tokenizers does not join tokens as the model's "
                f"{type(tokenizer).__name__} does: {wanted} becomes {back!r}, not {before!r}."
            )
