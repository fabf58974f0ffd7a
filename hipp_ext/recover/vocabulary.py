"""What the numbers of a model's logits stand for; teacher and student must agree on it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hipp_ext.calibration import find_processor, image_token_id
from hipp_ext.errors import CheckpointError, UnsupportedModelError
from hipp_ext.files.sealed import text_digest
from hipp_ext.files.untrusted import shown

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The vocabulary of a model and its tokenizer.

    Attributes:
        size: number of logits.
        image_token: id of the token that stands for pictures; None: there is none.
        tokens: token -> id, added tokens included; None: no tokenizer is known.
        added: id -> text of the added tokens.
        special: name of a special id -> id; None: it has none.
    """

    size: int
    image_token: int | None
    tokens: Mapping[str, int] | None = None
    added: Mapping[str, str] | None = None
    special: Mapping[str, int | None] | None = None

    @classmethod
    def of(cls, model: nn.Module, processor: Any = None) -> "Vocabulary":
        """The vocabulary of `model`.

        Args:
            model: a model with output embeddings.
            processor: its processor or tokenizer; None: the one beside its weights.

        Raises:
            UnsupportedModelError: the model has no output embeddings.
        """
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no output embeddings; a model with a language head "
                "is needed."
            )
        size, image = head.weight.shape[0], image_token_id(model)
        processor = processor or find_processor(model)
        if processor is None:
            return cls(size=size, image_token=image)
        tokenizer = getattr(processor, "tokenizer", processor)
        added = {str(number): str(t) for number, t in tokenizer.added_tokens_decoder.items()}
        special = {name: getattr(tokenizer, name, None) for name in SPECIAL}
        tokens = dict(tokenizer.get_vocab())
        return cls(size=size, image_token=image, tokens=tokens, added=added, special=special)

    def check_same(self, student: "Vocabulary") -> None:
        """Raise unless `student` has the vocabulary of this teacher.

        Where one of them has no tokenizer, only the number of logits and the image token are
        compared.

        Raises:
            CheckpointError: the vocabularies differ; the message says in what.
        """
        if differences := _differences(self, student):
            raise CheckpointError(
                f"Teacher and student have different vocabularies: {'; '.join(differences)}. "
                "A student learns from logits token by token: take the dense model that it was "
                "pruned from, with the same tokenizer."
            )

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all of it."""
        return text_digest(json.dumps(vars(self), sort_keys=True))


def _differences(teacher: Vocabulary, student: Vocabulary) -> list[str]:
    found = list[str]()
    if teacher.size != student.size:
        found.append(f"the teacher has {teacher.size:,} logits, the student {student.size:,}")
    if teacher.image_token != student.image_token:
        found.append(
            f"the image token is {teacher.image_token} for the teacher, {student.image_token} for "
            "the student"
        )
    for what, one, other in (
        ("token", teacher.tokens, student.tokens),
        ("added token", teacher.added, student.added),
        ("special id", teacher.special, student.special),
    ):
        if one is None or other is None:
            continue
        different = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        examples = ", ".join(
            f"{shown(repr(key), 40)} is {_value(one, key)} for the teacher, {_value(other, key)} "
            "for the student"
            for key in different[:2]
        )
        if different:
            found.append(f"{len(different):,} {what}{'s' * (len(different) > 1)} ({examples})")
    return found


def _value(table: Mapping[str, Any], key: str) -> str:
    return shown(repr(table[key]), 40) if key in table else "missing"
