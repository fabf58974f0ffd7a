"""Prompts, pictures and answers -> one left-padded batch, through a processor or a tokenizer."""

from collections.abc import Sequence
from typing import Any

import torch

from hipp_ext.calibration.batches import Batch

Message = dict[str, Any]  # {"role": ..., "content": [{"type": "text", "text": ...}, ...]}
Rendered = tuple[str, bool]  # a chat as text; whether the tokenizer has to add its beginning


def encode(
    processor: Any,
    prompts: Sequence[str],
    images: Sequence[Any],
    answers: Sequence[str] | None = None,
) -> Batch:
    """One left-padded batch: each prompt, with its image if any, through the chat template.

    Args:
        processor: processor of a vision-language model, with a chat template.
        prompts: user turns.
        images: a PIL image or None for each prompt.
        answers: texts appended to the prompts; `labels` then holds the tokens of the answers, and
            -100 elsewhere.

    Returns:
        input_ids, attention_mask, pixel_values, ... as the model's forward takes them; with
        answers also labels.
    """
    chats = [
        user_turn(prompt, pictures=int(image is not None))
        for prompt, image in zip(prompts, images, strict=True)
    ]
    pictures = [[] if image is None else [image] for image in images]
    return encode_rendered(processor, [render(processor, c) for c in chats], pictures, answers)


def encode_text(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str] | None = None
) -> Batch:
    """One left-padded batch: each prompt through the tokenizer's chat template, if it has one.

    Args:
        tokenizer: tokenizer of a language model. Without a padding token, its end-of-text token is
            the padding, under the mask.
        prompts: user turns.
        answers: texts appended to the prompts; `labels` then holds the tokens of the answers, and
            -100 elsewhere.

    Returns:
        input_ids and attention_mask [batch, tokens] int64; with answers also labels.
    """
    return encode(tokenizer, prompts, [None] * len(prompts), answers)


def is_tokenizer(processor: Any) -> bool:
    """Whether `processor` takes text alone."""
    return getattr(processor, "image_processor", None) is None


def user_turn(prompt: str, pictures: int = 0) -> list[Message]:
    """A chat of one user turn, its pictures first."""
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}]


def text_of(message: Message) -> str:
    """The text of a message, without its pictures."""
    return "\n".join(part["text"] for part in message["content"] if part["type"] == "text")


def render(processor: Any, messages: Sequence[Message]) -> Rendered:
    """The chat as a text that ends where the assistant's next turn begins.

    A tokenizer without a chat template gets a single user turn with "Answer:" below it, and a
    longer chat as lines of "role: text".
    """
    if not is_tokenizer(processor):
        return processor.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False
        ), False
    plain = [{"role": m["role"], "content": text_of(m)} for m in messages]
    # Templates of vision-language models take parts, most others take strings.
    for shape in (plain, list(messages)) if getattr(processor, "chat_template", None) else ():
        try:
            text = processor.apply_chat_template(shape, add_generation_prompt=True, tokenize=False)
        except (TypeError, ValueError):
            continue
        if plain[-1]["content"].strip() in text:
            return text, False
    if len(plain) == 1:
        return f"{plain[0]['content'].rstrip()}\nAnswer:", True
    lines = [f"{m['role']}: {m['content'].strip()}" for m in plain]
    return "\n".join([*lines, "assistant:"]), True


def encode_rendered(
    processor: Any,
    rendered: Sequence[Rendered],
    images: Sequence[Sequence[Any]],
    answers: Sequence[str] | None = None,
) -> Batch:
    """The batch of rendered chats with their pictures; see `encode` and `encode_text`."""
    if is_tokenizer(processor):
        return _encode_tokens(processor, rendered, answers)
    texts, pictures = [text for text, _ in rendered], [list(own) for own in images if own]
    full = texts
    if answers is not None:
        full = [join_answer(t, a) for t, a in zip(texts, answers, strict=True)]
    batch = tokenise(processor, full, pictures)
    if answers is not None:
        prompt_lengths = tokenise(processor, texts, pictures)["attention_mask"].sum(1)
        lengths = batch["attention_mask"].sum(1)
        from_end = torch.arange(batch["input_ids"].shape[1], 0, -1)
        is_answer = from_end[None] <= (lengths - prompt_lengths)[:, None]
        batch["labels"] = torch.where(is_answer, batch["input_ids"], -100)
    return batch


def _encode_tokens(
    tokenizer: Any, rendered: Sequence[Rendered], answers: Sequence[str] | None
) -> Batch:
    rows, labels = [], []
    for number, (text, special) in enumerate(rendered):
        asked = whole = tokenizer(text, add_special_tokens=special)["input_ids"]
        if answers is not None:
            full = join_answer(text, answers[number])
            whole = tokenizer(full, add_special_tokens=special)["input_ids"]
        # A tokenizer may merge the end of the prompt with the answer: the answer starts where the
        # two first differ.
        start = next(
            (i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b),
            min(len(asked), len(whole)),
        )
        rows.append(whole)
        labels.append([-100] * start + whole[start:])
    return padded(tokenizer, rows, None if answers is None else labels)


def padding_id(tokenizer: Any) -> int:
    """The token that pads: without a padding token the end of text, and without either 0."""
    return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)


def padded(
    tokenizer: Any, rows: Sequence[Sequence[int]], labels: Sequence[Sequence[int]] | None = None
) -> Batch:
    """The batch of token ids, padded on the left, with labels of the same lengths."""
    longest = max(map(len, rows))
    pad = padding_id(tokenizer)

    def left(fill: int, values: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor([[fill] * (longest - len(own)) + list(own) for own in values])

    batch = {
        "input_ids": left(pad, rows),
        "attention_mask": left(0, [[1] * len(ids) for ids in rows]),
    }
    return batch if labels is None else batch | {"labels": left(-100, labels)}


def tokenise(
    processor: Any, texts: Sequence[str], images: Sequence[Any] | None = None, **kwargs: Any
) -> Batch:
    """One left-padded batch of rendered chats, each with one beginning-of-text token.

    Many templates write that token themselves, and the tokenizer would add a second one;
    transformers' `processor.apply_chat_template(tokenize=True)` avoids it in the same way.

    Args:
        processor: a processor, or the tokenizer of a language model.
        texts: chats as the processor's chat template renders them.
        images: the pictures of each text that has any, as the processor takes them; None or empty:
            no pictures.
        kwargs: further options of the processor.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    beginning = getattr(tokenizer, "bos_token", None)
    written = bool(beginning) and all(text.startswith(beginning) for text in texts)
    if written or all(_begins_twice(tokenizer, text) for text in texts):
        kwargs["add_special_tokens"] = False
    if images:
        kwargs["images"] = images
    # Only left padding puts the answer position of every row at the end.
    return dict(
        processor(
            text=list(texts), padding=True, padding_side="left", return_tensors="pt", **kwargs
        )
    )


def _begins_twice(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer repeats the token that a text begins with; not every such token is
    called bos_token."""
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(plain) and tokenizer(text)["input_ids"][:2] == [plain[0]] * 2 != plain[:2]


def join_answer(text: str, answer: str) -> str:
    """The prompt with its answer. Templates end in a line break, or in "ASSISTANT:"; after the
    latter the answer follows a space."""
    return text + answer if text[-1:].isspace() else f"{text} {answer}"
