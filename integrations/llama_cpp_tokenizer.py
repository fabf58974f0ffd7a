"""A transformers tokenizer as llama.cpp's `tokenizer.ggml` fields."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hipp_ext.errors import CheckpointError, UnsupportedModelError
from hipp_ext.integrations.llama_cpp_pretokenizers import pre_tokenizer_name

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_ADVICE = (
    "If a GGUF file of the unpruned model exists, take the tokenizer from it: --tokenizer-from "
    "FILE."
)
_ODD_MERGES = 0.01  # of the pairs that make a token, those without a merge


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What llama.cpp is told of a tokenizer.

    Attributes:
        model: "gpt2" (byte-level BPE), "llama" (SentencePiece BPE) or "t5" (unigram).
        pre: name of the pre-tokenizer.
        tokens: text of every token, by its id.
        types: NORMAL, ..., BYTE, by id.
        ids: "bos", "eos", "eot", "unk", "pad" -> id, for those there are.
        bos, eos: whether a text begins and ends with it.
        merges: pairs, best first; none for "llama" and "t5".
        scores: by id; none for "gpt2".
        flags: other fields that are true or false, such as "add_space_prefix".
        charsmap: SentencePiece's compiled normalisation.
        template: chat template, or named ones.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    ids: Mapping[str, int]
    bos: bool
    eos: bool
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()
    flags: Mapping[str, bool] = field(default_factory=dict)
    charsmap: bytes = b""
    template: str | Mapping[str, str] | None = None

    def add(self, writer: Any) -> None:
        """Add the fields to a gguf.GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, value in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(value)
        writer.add_add_bos_token(self.bos)
        writer.add_add_eos_token(self.eos)
        for name, value in self.flags.items():
            getattr(writer, f"add_{name}")(value)
        if self.charsmap:
            writer.add_precompiled_charsmap(self.charsmap)
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
    if not any((folder / name).is_file() for name in FILES):
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
    model, steps = spec["model"], _steps(spec)
    if any(step["type"] == "ByteLevel" for step in steps) and model["type"] == "BPE":
        own = _byte_level(backend, spec, model)
    elif model["type"] == "BPE" and model.get("byte_fallback"):
        own = _sentencepiece(model, steps)
    elif model["type"] == "Unigram" and not model.get("byte_fallback"):
        own = _unigram(model, steps)
    else:
        fallback = " with bytes for unknown characters" if model.get("byte_fallback") else ""
        raise UnsupportedModelError(
            f"The tokenizer is a {model['type']} model{fallback} behind "
            f"{', '.join(step['type'] for step in steps) or 'no other step'}; byte-level BPE, "
            "SentencePiece BPE with bytes for unknown characters, and unigram models can be "
            f"written. {_ADVICE}"
        )
    tokens, types = _tokens(tokenizer, spec, rows, own.pop("special_bytes"))
    bos, eos = _added(tokenizer)
    if "scores" in own:
        own["scores"] = [own["scores"].get(token, own["lowest"]) for token in tokens]
        del own["lowest"]
    return Vocabulary(
        tokens=tokens,
        types=types,
        ids=_ids(tokenizer, ends, rows),
        bos=bos,
        eos=eos,
        template=getattr(tokenizer, "chat_template", None),
        **own,
    )


def _steps(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Normalizers and pre-tokenizers, one after another."""
    found: list[dict[str, Any]] = []
    rest = [spec.get("normalizer"), spec.get("pre_tokenizer")]
    while rest:
        step = rest.pop(0)
        if step is not None and step["type"] == "Sequence":
            rest = [*(step.get("normalizers") or step.get("pretokenizers") or ()), *rest]
        elif step is not None:
            found.append(step)
    return found


def _byte_level(backend: Any, spec: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    normalizers = _steps({"normalizer": spec.get("normalizer")})
    # Text that is not in NFC already gets other ids in llama.cpp, which normalises nothing.
    odd = [step["type"] for step in normalizers if step["type"] != "NFC"]
    odd += [k for k in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(k)]
    if odd:
        raise UnsupportedModelError(
            f"The tokenizer is byte-level BPE with {', '.join(odd)}, which llama.cpp does not "
            f"have. {_ADVICE}"
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    pre = pre_tokenizer_name(backend, bool(model.get("ignore_merges")))
    return {"model": "gpt2", "pre": pre, "merges": merges, "special_bytes": False}


def _sentencepiece(model: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores that have llama.cpp join pieces in the order of the merges."""
    prefix = _space_prefix(steps)
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    vocab = model["vocab"]
    rank: dict[str, int] = {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    known = set(merges)
    pairs = [
        (token[:i], token[i:])
        for token in vocab
        if not _is_byte(token)
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    odd = sum(pair not in known for pair in pairs)
    if odd > _ODD_MERGES * len(pairs):
        raise UnsupportedModelError(
            f"The tokenizer is BPE, but not SentencePiece's: {odd:,} of {len(pairs):,} pairs that "
            f"make a token are no merges, and llama.cpp would join them. {_ADVICE}"
        )
    scores = {token: -float(place) for token, place in rank.items()}
    return {
        "model": "llama",
        "pre": "default",
        "scores": scores,
        "lowest": -1e6,
        "flags": {"add_space_prefix": prefix},
        "special_bytes": True,
    }


def _unigram(model: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    charsmap, squeezes, rest = b"", False, []
    for step in steps:
        if step["type"] == "Precompiled":
            charsmap = base64.b64decode(step["precompiled_charsmap"])
        elif step["type"] == "Strip" or (
            step["type"] == "Replace" and "{2,}" in step["pattern"].get("Regex", "")
        ):
            squeezes = True
        elif step["type"] != "WhitespaceSplit":
            rest.append(step)
        else:
            squeezes = True
    scores = {token: float(score) for token, score in model["vocab"]}
    return {
        "model": "t5",
        "pre": "default",
        "scores": scores,
        "lowest": 0.0,
        "charsmap": charsmap,
        "flags": {"add_space_prefix": _space_prefix(rest), "remove_extra_whitespaces": squeezes},
        "special_bytes": False,
    }


def _space_prefix(steps: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a text gets a space in front; raises for steps that SentencePiece does not have."""
    prefix = False
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == "\u2581":
            prefix = True
        elif kind == "Metaspace" and step.get("replacement") == "\u2581":
            prefix = step.get("prepend_scheme", "always") != "never"
        elif not (kind == "Replace" and step["content"] == "\u2581"):
            raise UnsupportedModelError(
                f"The tokenizer has a step {kind}, which SentencePiece does not have. {_ADVICE}"
            )
    return prefix


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _tokens(
    tokenizer: Any, spec: Mapping[str, Any], rows: int, has_bytes: bool
) -> tuple[list[str], list[int]]:
    """Texts and types of all tokens, by id."""
    vocab = tokenizer.get_vocab()
    if vocab and (largest := max(vocab.values())) >= rows:
        raise CheckpointError(
            f"The tokenizer has a token {largest}, and the model {rows} rows of embeddings: it "
            "belongs to another model."
        )
    by_id = {number: token for token, number in vocab.items()}
    tokens, types = [], []
    for number in range(rows):
        token = by_id.get(number)
        tokens.append(_free(f"[PAD{number}]", vocab) if token is None else token)
        byte = has_bytes and token is not None and _is_byte(token)
        types.append(UNUSED if token is None else BYTE if byte else NORMAL)
    for added in spec["added_tokens"]:
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = tokenizer.unk_token_id
    if unknown is not None and spec["model"]["type"] != "BPE" or has_bytes and unknown is not None:
        types[unknown] = UNKNOWN
    return tokens, types


def _free(name: str, taken: Mapping[str, int]) -> str:
    return name if name not in taken else _free(f"{name}_", taken)


def _added(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts its bos token before a text, and its eos token behind it."""
    plain = tokenizer("a b", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a b")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for before in (False, True):
        for behind in (False, True):
            expected = [*([bos] if before else []), *plain, *([eos] if behind else [])]
            if whole == expected and None not in expected:
                return before, behind
    raise UnsupportedModelError(
        f"The tokenizer makes {whole} of a text of the ids {plain}: only a token of beginning "
        f"({bos}) and one of end ({eos}) can be written. {_ADVICE}"
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
