"""Which row of a batch the tokens of a picture belong to."""

import torch
from jaxtyping import Int
from torch import Tensor, nn

from hipp_ext.calibration import Batch, image_token_id
from hipp_ext.towers import picture_tokens


def picture_rows(
    model: nn.Module, batch: Batch, shape: torch.Size
) -> Int[Tensor, " tokens"] | None:
    """The row of each token that passes a layer before the language tower; None: it is not known.

    Pictures come in the order of the rows. A row has as many of their tokens as it has places for
    them, in proportion: where all rows with pictures have equally many places, where all pictures
    have the same size, or where each has a grid of its own. Tiles that the model cuts a picture
    into follow no such rule.

    Args:
        model: its configuration tells which tokens stand for pictures.
        batch: inputs of the model's forward.
        shape: shape of what enters the layer, (..., channels).
    """
    token = image_token_id(model)
    tokens = shape[:-1].numel()
    if token is None:
        return None
    places = (batch["input_ids"].cpu() == token).sum(1)
    alike = len(set(places[places > 0].tolist())) == 1
    regular = "image_grid_thw" in batch or (len(shape) > 2 and "image_sizes" not in batch)
    total = int(places.sum())
    if not total or not (alike or regular) or bool((tokens * places % total).any()):
        return None
    return torch.arange(len(places)).repeat_interleave(tokens * places // total)


def picture_token_count(model: nn.Module, batch: Batch) -> int:
    """About how many tokens the pictures of a batch have in the vision tower."""
    pixels = batch.get("pixel_values")
    if pixels is None:
        return 0
    if pixels.ndim < 4:  # patches side by side
        return pixels.shape[:-1].numel()
    return pixels.shape[:-3].numel() * (picture_tokens(model.config) + 1)
