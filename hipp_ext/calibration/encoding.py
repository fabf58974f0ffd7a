"""Prompts, pictures and answers -> one left-padded batch, through a processor or a tokenizer."""

from collections.abc import Sequence
from typing import Any

import torch

from hipp_ext.calibration.batches import Batch


def encode(
    processor: Any,
    prompts: Sequence[str],
    images: Sequence[Any],
    answers: Sequence[str] | None = None,
) -> Batch:
    """One left-padded batch: each prompt, with its image where there is one, through the processor's chat template.

    Args:
        processor: of a vision-language model with a chat template.
        prompts: user turns.
        images: a PIL image or None for each prompt.
        answers: appended after the prompt; then `labels` holds the answers' tokens and -100 elsewhere.

    Returns:
        input_ids, attention_mask, pixel_values, ... as the model's forward takes them, and labels with answers.
    """
    texts = []
    for prompt, image in zip(prompts, images, strict=True):
        content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": prompt}]
        message = {"role": "user", "content": content}
        texts.append(
            processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        )
    pictures = [[i] for i in images if i is not None]
    full = (
        texts
        if answers is None
        else [join_answer(t, a) for t, a in zip(texts, answers, strict=True)]
    )
    batch = tokenise(processor, full, pictures)
    if answers is not None:
        prompt_lengths = tokenise(processor, texts, pictures)["attention_mask"].sum(1)
        lengths = batch["attention_mask"].sum(1)
        from_end = torch.arange(batch["input_ids"].shape[1], 0, -1)
        is_answer = from_end[None] <= (lengths - prompt_lengths)[:, None]
        batch["labels"] = torch.where(is_answer, batch["input_ids"], -100)
    return batch


def tokenise(
    processor: Any, texts: Sequence[str], images: Sequence[Any] | None = None, **kwargs: Any
) -> Batch:
    """One left-padded batch of chats that a template has rendered, each with one beginning-of-text token.

    Many templates write that token themselves, and the tokenizer would add a second one; transformers'
    `processor.apply_chat_template(tokenize=True)` avoids it in the same way.

    Args:
        processor: a processor, or the tokenizer of a language model.
        texts: rendered by the processor's chat template.
        images: the pictures of each text that has any, as the processor takes them; None or empty: none.
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
    """Whether the tokenizer puts before a text the token that it begins with; not every such token is called bos_token."""
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(plain) and tokenizer(text)["input_ids"][:2] == [plain[0]] * 2 != plain[:2]


def join_answer(text: str, answer: str) -> str:
    """Templates end in a line break or in "ASSISTANT:"; after the latter the answer follows a space."""
    return text + answer if text[-1:].isspace() else f"{text} {answer}"


def is_tokenizer(processor: Any) -> bool:
    """Whether `processor` takes text alone."""
    return getattr(processor, "image_processor", None) is None


def encode_text(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str] | None = None
) -> Batch:
    """One left-padded batch: each prompt through the tokenizer's chat template, or as it is where there is none.

    Args:
        tokenizer: of a language model; one without a padding token is padded with its end of text, under the mask.
        prompts: user turns.
        answers: appended after the prompt; then `labels` holds the answers' tokens and -100 elsewhere.

    Returns:
        input_ids and attention_mask [batch, tokens] int64, and labels with answers.
    """
    rows, labels = [], []
    for number, prompt in enumerate(prompts):
        text, special = _ask(tokenizer, prompt)
        asked = tokenizer(text, add_special_tokens=special)["input_ids"]
        whole = (
            asked
            if answers is None
            else tokenizer(join_answer(text, answers[number]), add_special_tokens=special)[
                "input_ids"
            ]
        )
        # A tokenizer may merge the end of the prompt with the answer: the answer starts where the two first differ.
        start = next(
            (i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b),
            min(len(asked), len(whole)),
        )
        rows.append(whole)
        labels.append([-100] * start + whole[start:])
    longest = max(map(len, rows))
    padding = next(
        (t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0
    )
    batch = {
        "input_ids": torch.tensor([[padding] * (longest - len(ids)) + ids for ids in rows]),
        "attention_mask": torch.tensor(
            [[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows]
        ),
    }
    if answers is not None:
        batch["labels"] = torch.tensor([[-100] * (longest - len(ids)) + ids for ids in labels])
    return batch


def _ask(tokenizer: Any, prompt: str) -> tuple[str, bool]:
    """The text that asks `prompt`, and whether the tokenizer has to add its own beginning."""
    if not getattr(tokenizer, "chat_template", None):
        return f"{prompt.rstrip()}\nAnswer:", True
    for content in (
        prompt,
        [{"type": "text", "text": prompt}],
    ):  # templates of vision-language models want parts
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        except (TypeError, ValueError):
            continue
        if prompt.strip() in text:
            return text, False
    return f"{prompt.rstrip()}\nAnswer:", True
