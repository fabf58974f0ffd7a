"""Answers scored in one forward pass: the next-token distribution where the answer would start.

Everything before the language tower (vision tower, projector, embeddings) is computed once and replayed, because a
plan for the language tower does not change it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.calibration import Batch
from hipp_ext.groups import decoder
from hipp_ext.scorers.base import evaluating, forward, valid_tokens


class AnswerLogits:
    """`logits(model)` gives, for every row of `batches`, the logits of the token that would answer it.

    The answer starts at the first label, or after the last token where a batch has no labels.

    Args:
        model: measured once on `batches`; later calls may prune or mask its language tower, and nothing else.
        batches: as the model's forward takes them.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]):
        self._inputs: list[tuple[dict[str, Any], Tensor]] = []
        with torch.no_grad(), evaluating(model):
            for batch in batches:
                self._inputs.append((_decoder_inputs(model, batch), _answer_positions(batch)))

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Float[Tensor, "rows vocabulary"]:
        """float32, on the CPU, in the order of the batches' rows."""
        rows = []
        with evaluating(model):
            for inputs, position in self._inputs:
                hidden = decoder(model)(**inputs).last_hidden_state
                last = hidden[torch.arange(hidden.shape[0]), position.to(hidden.device)]
                rows.append(model.get_output_embeddings()(last).float().cpu())  # type: ignore[operator]
        return torch.cat(rows)


class _Captured(Exception):
    """Ends a forward pass once the inputs of the language tower are known."""


def _decoder_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    captured: dict[str, Any] = {}

    def capture(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        assert not args, "transformers calls its decoders with keywords"
        captured.update(kwargs)
        raise _Captured

    handle = decoder(model).register_forward_pre_hook(capture, with_kwargs=True)
    try:
        forward(model, batch)
    except _Captured:
        pass
    finally:
        handle.remove()
    return captured


def _answer_positions(batch: Batch) -> Tensor:
    """(batch,) index of the token whose output predicts the answer's first token."""
    length = batch["input_ids"].shape[1]
    if "labels" in batch:
        answered = batch["labels"] != -100
        first = torch.argmax(answered.int(), 1)
        # A row without any label is answered after its last token, like a batch without labels.
        return torch.where(answered.any(1), first - 1, _last_token(batch, length)).clamp_min(0)
    return _last_token(batch, length)


def _last_token(batch: Batch, length: int) -> Tensor:
    return length - 1 - torch.argmax(valid_tokens(batch).int().flip(1), 1)
