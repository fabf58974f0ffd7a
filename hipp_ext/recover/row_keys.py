"""By which key a row of a batch is found again, in whatever batch it is."""

import hashlib

import torch
from torch import Tensor

from hipp_ext.calibration import Batch
from hipp_ext.errors import CalibrationError
from hipp_ext.families import PICTURES
from hipp_ext.recover.places import Places
from hipp_ext.scorers.base import valid_tokens


def row_keys(batch: Batch, places: Places) -> list[str]:
    """A digest of each row: its tokens, its counted positions and its pictures.

    It is the same in every batch that the row is in, whatever the padding.

    Raises:
        CalibrationError: it is not known which pictures belong to which row. In batches of one row
            it always is.
    """
    valid, pictures = valid_tokens(batch).cpu(), _pictures_by_row(batch, places.image_token)
    counted = torch.zeros_like(valid)
    counted[places.rows, places.columns] = True
    keys = []
    for row, own in enumerate(pictures):
        tokens = torch.stack([batch["input_ids"].cpu(), counted.long()])[:, row, valid[row]]
        digest = hashlib.sha256(tokens.contiguous().numpy().tobytes())
        for pixels in own:
            digest.update(f"{tuple(pixels.shape)} {pixels.dtype}".encode())
            digest.update(pixels.contiguous().view(torch.uint8).numpy().tobytes())
        keys.append(digest.hexdigest()[:32])
    return keys


def _pictures_by_row(batch: Batch, token: int | None) -> list[list[Tensor]]:
    """The pictures of every row: in the order of the rows, as many as it has places for.

    Pictures of zeros, with which rows are filled up to equal numbers, are left out.
    """
    tensors = [batch[name].cpu() for name in PICTURES if batch.get(name) is not None]
    ids = batch["input_ids"].cpu()
    places = torch.zeros(len(ids)).long() if token is None else (ids == token).sum(1)
    total, found = int(places.sum()), [list[Tensor]() for _ in ids]
    # Tiles of pictures follow no rule, unless every picture has as many as any other.
    regular = len(set(places[places > 0].tolist())) == 1 or "image_sizes" not in batch
    for pixels in tensors:
        if pixels.ndim > 4 and len(pixels) == len(ids) and "image_sizes" not in batch:
            for own, part in zip(found, pixels, strict=True):  # (pictures, ...)
                real = part[part.flatten(1).any(1)]
                own += [real] if len(real) else []
            continue
        if len(ids) == 1:
            found[0].append(pixels)
            continue
        shares = len(pixels) * places
        if not total or not regular or bool((shares % total).any()):
            raise CalibrationError(
                f"Which of the pictures {tuple(pixels.shape)} belong to which of {len(ids)} rows "
                "is not known: take batches of one row (batch_size=1)."
            )
        parts = pixels.split((shares // total).tolist())
        for own, part in zip(found, parts, strict=True):
            own += [part] if len(part) else []
    return found
