"""Questions without pictures -> batches of a language model, through its own tokenizer."""

from collections.abc import Sequence
from typing import Any

import torch

from hipp_ext.calibration import Batch, join_answer


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
