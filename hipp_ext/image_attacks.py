"""Image attacks on vision-language models, within a ball of pixels around each image."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hipp_ext.attacks import APGD, PGD, Ball, check_precision
from hipp_ext.calibration import Batch
from hipp_ext.errors import AttackError, CalibrationError
from hipp_ext.modes import evaluating
from hipp_ext.scorers.base import forward


class ImageAttack:
    """`attack(model, batch)` -> the batch with `pixel_values` moved to raise each row's loss.

    The ball is L-inf in pixels in [0, 1], through the processor's normalisation: a step of 1/255 is
    one step of a byte in every channel, however the channel is scaled. Everything else in the batch
    stays, so every row may have its own prompt and answer.

    Args:
        processor: processor of the model; its image processor gives the normalisation.
        epsilon: radius, in units of pixels in [0, 1].
        steps: number of gradient steps.
        kind: "pgd" or "apgd".
        seed: random seed of the starting point.

    Raises:
        AttackError: epsilon is not above zero; the kind is unknown; the processor has no
            normalisation per channel; or, when called, a batch has no pixel_values of shape (rows,
            [tiles,] channels, height, width), or they lie outside the range of pixels.
        CalibrationError (when called): a batch has no labels.
        UnsupportedModelError (when called): the model is in half precision.

    Source: Schlarmann & Hein (arXiv 2308.10741), section 3: attacks on the images of VLMs.
    Differs from the paper: the loss of the correct answer is raised, per row, instead of lowering
    the loss of a wrong one.
    """

    def __init__(
        self,
        processor: Any,
        *,
        epsilon: float = 4 / 255,
        steps: int = 20,
        kind: Literal["pgd", "apgd"] = "pgd",
        seed: int = 0,
    ):
        if kind not in ("pgd", "apgd"):
            raise AttackError(f"An image attack is pgd or apgd, not {kind!r}.")
        self.ball, self.epsilon, self.seed = pixel_ball(processor, epsilon), epsilon, seed
        self.method = {"pgd": PGD, "apgd": APGD}[kind](ball=self.ball, steps=steps, seed=seed)

    def __call__(self, model: nn.Module, batch: Batch) -> Batch:
        pixels = batch.get("pixel_values")
        if pixels is None or pixels.dim() not in (4, 5):
            raise AttackError(
                "An image attack needs pixel_values of shape (rows, [tiles,] channels, height, "
                f"width); the batch has {None if pixels is None else tuple(pixels.shape)}. "
                "Flattened patches are not pictures; attack before they are flattened."
            )
        if "labels" not in batch:
            raise CalibrationError(
                "An image attack raises the loss of the labels, and the batch has none, only "
                f"{sorted(batch)}."
            )
        check_precision(model)
        device = next(model.parameters()).device
        with evaluating(model):
            moved = self.method(
                lambda b, x: answer_losses(model, {**b, "pixel_values": x}),
                batch,
                pixels.to(device),
            )
        return batch | {"pixel_values": moved}


def pixel_ball(processor: Any, epsilon: float) -> Ball:
    """The ball of radius `epsilon` in pixels in [0, 1], per channel in units of `pixel_values`.

    Raises:
        AttackError: epsilon is not above zero, or the image processor has no image_mean and
            image_std.
    """
    Ball(epsilon=epsilon)
    images = getattr(processor, "image_processor", processor)
    mean, std = getattr(images, "image_mean", None), getattr(images, "image_std", None)
    if not getattr(images, "do_normalize", True):
        mean, std = [0.0], [1.0]
    if not _numbers(mean) or not _numbers(std) or min(std) <= 0:  # type: ignore[type-var, arg-type]
        raise AttackError(
            f"{type(images).__name__} has no image_mean and image_std, so epsilon cannot be "
            "converted from pixel units."
        )
    m, s = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (mean, std))
    return Ball(epsilon=epsilon / s, low=(0 - m) / s, high=(1 - m) / s)


def answer_losses(model: nn.Module, batch: Batch) -> Tensor:
    """(rows,) cross-entropy of each row's labels, summed over its answer."""
    output = forward(model, {k: v for k, v in batch.items() if k != "labels"})
    labels = batch["labels"].to(output.logits.device)[:, 1:]
    logits = output.logits[:, :-1].float()
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
    )
    return losses.view(labels.shape).sum(1)


def _numbers(values: Any) -> bool:
    return (
        isinstance(values, Sequence)
        and bool(values)
        and all(isinstance(v, int | float) for v in values)
    )
