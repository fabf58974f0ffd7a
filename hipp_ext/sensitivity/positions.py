"""Which positions of a batch count when outputs are compared."""

import hashlib

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from hipp_ext.calibration import Batch, Calibration, image_token_id
from hipp_ext.scorers.base import valid_tokens


def counted_positions(model: nn.Module, batch: Batch) -> Bool[Tensor, "rows tokens"]:
    """True where the next-token distribution counts, at least once in every row; on the CPU.

    In a batch with labels these are the positions that predict a label (in a row without any, its
    last token); else all text tokens after the last picture; else all tokens. Padding never counts.

    Args:
        model: its configuration tells which tokens stand for pictures.
        batch: inputs of the model's forward.
    """
    valid = valid_tokens(batch).cpu()
    last = torch.zeros_like(valid)
    last[torch.arange(len(valid)), valid.shape[1] - 1 - valid.int().flip(1).argmax(1)] = True
    if "labels" in batch:
        predicts = torch.zeros_like(valid)
        predicts[:, :-1] = batch["labels"].cpu()[:, 1:] != -100
        counted = predicts & valid
    else:
        token, ids = image_token_id(model), batch["input_ids"].cpu()
        picture = torch.zeros_like(valid) if token is None else ids == token
        counted = valid & (picture.flip(1).cumsum(1).flip(1) == 0)
    return torch.where(counted.any(1, keepdim=True), counted, last)


def positions_digest(model: nn.Module, calibration: Calibration) -> str:
    """Hex digest of the counted positions of a calibration."""
    digest = hashlib.sha256()
    for batch in calibration.batches:
        digest.update(counted_positions(model, batch).numpy().tobytes())
    return digest.hexdigest()
