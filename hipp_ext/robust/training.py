"""Adversarial training that resumes to the same weights, and the recalibration of batch norms."""

import contextlib
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hipp_ext.attacks import check_precision
from hipp_ext.errors import AttackError, CheckpointError, DataError, UnsupportedModelError
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import digest, seal, unseal
from hipp_ext.modes import restored
from hipp_ext.quantities import take_numbers
from hipp_ext.robust.data import ImageData, Images, check_images
from hipp_ext.robust.losses import AdversarialLoss, attacked, backward
from hipp_ext.runs import RunFolder
from hipp_ext.training import load_optimizers, optimizer_tensors

WARM_UP = 0.3  # fraction of the steps in which the learning rate rises
CHECKPOINT = "train.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of the training: SGD with Nesterov momentum and one cycle of the learning rate.

    Images are shifted at random, and mirrored where that keeps the class.

    Attributes:
        epochs: number of epochs.
        batch_size: images per step.
        lr: largest learning rate; it rises from lr / 25 over 30% of the steps and falls to
            almost 0.
        weight_decay: weight decay of SGD.
        seed: random seed of the order, the shifts, the attacks and dropout.
    """

    epochs: int = 15
    batch_size: int = 128
    lr: float = 0.05
    weight_decay: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        wholes, finites = ("epochs", "batch_size", "seed"), ("lr", "weight_decay")
        take_numbers(self, DataError, wholes=wholes, finites=finites)
        if self.epochs < 0 or self.batch_size < 1 or not self.lr > 0:
            raise DataError(f"Training needs epochs >= 0, batch_size >= 1 and lr > 0, got {self}.")


OnEpoch = Callable[[int, float], None]  # (number of finished epochs, mean loss of the last one)


def train(
    model: nn.Module,
    data: ImageData,
    loss: AdversarialLoss,
    settings: TrainSettings,
    *,
    folder: str | Path | RunFolder | None = None,
    on_epoch: OnEpoch | None = None,
) -> list[float]:
    """Train `model` in place; returns the mean loss of every epoch.

    The same settings give the same weights to the bit, on a CPU with as many threads.

    Args:
        model: floating point of 32 bits or more. Train/eval modes and requires_grad are restored
            afterwards; frozen weights stay.
        data: its training images are used, not its test images.
        loss: see `hipp_ext.robust.losses`; called in train mode.
        settings: see `TrainSettings`.
        folder: folder for a checkpoint after every epoch. An interrupted call resumes from it, and
            ends with the weights of an uninterrupted one. It belongs to these settings, weights and
            images, and to this loss (as its repr gives it), and no other call takes it. A
            `RunFolder` is used as it is. None: nothing is written.
        on_epoch: called after every epoch.

    Raises:
        UnsupportedModelError: the model is in half precision, or nothing of it requires gradients.
        AttackError: the loss became NaN or infinite.
        CheckpointError: `folder` holds a run with other settings, another model, other data or
            another loss, or is damaged.
        OutputBusyError: another process works in `folder`.
    """
    check_precision(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise UnsupportedModelError(
            f"No weight of this {type(model).__name__} requires gradients; there is nothing to "
            "train."
        )
    check_images(data.train, len(data.classes), f"{data.name} train")
    optimizer = torch.optim.SGD(
        parameters, settings.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
    )
    optimizer.zero_grad()
    with restored(model, random_state=True), contextlib.ExitStack() as stack:
        if isinstance(folder, str | Path):
            folder = stack.enter_context(RunFolder(folder, _identity(model, data, loss, settings)))
        history = [] if folder is None else _load(folder, model, optimizer)
        model.train()
        for epoch in range(len(history), settings.epochs):
            history.append(_epoch(model, data, loss, settings, optimizer, epoch))
            if folder is not None:
                tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
                tensors |= optimizer_tensors([optimizer])
                write_atomic(folder / CHECKPOINT, seal(tensors, {"history": history}))
            if on_epoch is not None:
                on_epoch(len(history), history[-1])
    return history


def _load(run: RunFolder, model: nn.Module, optimizer: Any) -> list[float]:
    """Load the checkpoint in `run` if there is one; returns the losses until then."""
    if not (run / CHECKPOINT).exists():
        return []
    try:
        tensors, about = unseal(run / CHECKPOINT)
        model.load_state_dict({n: tensors.pop(f"model.{n}") for n in model.state_dict()})
        load_optimizers([optimizer], tensors)
        return about["history"]
    except (CheckpointError, KeyError, ValueError, RuntimeError) as error:
        raise run.damaged(error) from error


def _epoch(
    model: nn.Module,
    data: ImageData,
    loss: AdversarialLoss,
    settings: TrainSettings,
    optimizer: Any,
    epoch: int,
) -> float:
    # Every epoch has its own seed, so that it does not matter where a run was interrupted.
    seed = settings.seed * 1_000_003 + epoch
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout draws from the global state, which `train` restores
    order = torch.randperm(len(data.train), generator=generator)
    device = next(model.parameters()).device
    batches = order.split(settings.batch_size)
    total = 0.0
    for number, rows in enumerate(batches):
        images, labels = data.train.rows(rows)
        images = augment(images, data, generator).to(device)
        attack_seed = seed * 7919 + number * settings.batch_size
        value = backward(loss, model, images, labels.to(device), attack_seed)
        if not math.isfinite(value):
            raise AttackError(
                f"The training loss is {value} in epoch {epoch + 1}; lower the learning rate "
                f"({settings.lr})."
            )
        step, steps = epoch * len(batches) + number, settings.epochs * len(batches)
        optimizer.param_groups[0]["lr"] = cycle(settings.lr, step, steps)
        optimizer.step()
        optimizer.zero_grad()
        total += value * len(labels)
    return total / len(order)


def _identity(
    model: nn.Module, data: ImageData, loss: AdversarialLoss, settings: TrainSettings
) -> dict[str, Any]:
    # Not the buffers: batch norms that were measured again under attack may differ in the last bit.
    return {
        "settings": asdict(settings),
        "model": digest(dict(model.named_parameters())),
        "data": data_identity(data),
        "loss": loss_identity(loss),
    }


def data_identity(data: ImageData) -> dict[str, Any]:
    """What distinguishes training images from others, as plain values."""
    train = {"images": data.train.images, "labels": data.train.labels}
    return {
        "name": data.name,
        "rows": len(data.train),
        "digest": digest(train),
        "pad": data.pad,
        "mirror": data.mirror,
    }


def loss_identity(loss: AdversarialLoss) -> str:
    """The repr of a loss without addresses: class and settings, or the function's name."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(loss))


def cycle(lr: float, step: int, steps: int) -> float:
    """The learning rate at a step: cosine up from lr / 25 to lr, cosine down to lr / 10,000."""
    peak = max(1.0, WARM_UP * steps)
    if step < peak:
        return lr / 25 + (lr - lr / 25) * (1 - math.cos(math.pi * step / peak)) / 2
    fraction = (step - peak) / max(1.0, steps - peak)
    return lr / 1e4 + (lr - lr / 1e4) * (1 + math.cos(math.pi * fraction)) / 2


def augment(images: Tensor, data: ImageData, generator: torch.Generator) -> Tensor:
    """Images shifted at random by up to `data.pad` pixels, and mirrored where `data.mirror`."""
    rows, _, height, width = images.shape
    padded = nn.functional.pad(images, (data.pad,) * 4)
    shift = torch.randint(0, 2 * data.pad + 1, (rows, 2), generator=generator)
    flip = torch.rand(rows, generator=generator) < 0.5
    ys = shift[:, :1] + torch.arange(height)
    xs = shift[:, 1:] + torch.arange(width)
    if data.mirror:
        xs = torch.where(flip[:, None], xs.flip(1), xs)
    moved = padded[torch.arange(rows)[:, None, None], :, ys[:, :, None], xs[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


def recalibrate(
    model: nn.Module,
    images: Images,
    epsilon: float,
    *,
    steps: int = 5,
    passes: int = 1,
    batch_size: int = 128,
    seed: int = 0,
) -> None:
    """Measure the statistics of batch norms again, on attacked images; the weights stay.

    After channels were removed, a network's accuracy is at chance. An inner attack, which runs in
    eval mode, would otherwise attack that network.

    Args:
        model: attacked as it is; only statistics of its batch norms change.
        images: all of them are used.
        epsilon: L-inf radius of PGD.
        steps: gradient steps of PGD.
        passes: number of passes; each attacks the model that the previous one left.
        batch_size: images per batch.
        seed: random seed of PGD's starting point.
    """
    batch_norm = nn.modules.batchnorm._BatchNorm
    norms = [m for m in model.modules() if isinstance(m, batch_norm) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    device = next(model.parameters()).device
    with restored(model, random_state=True):
        try:
            for number in range(passes):
                model.eval()
                batches = [(x.to(device), y.to(device)) for x, y in images.batches(batch_size)]
                seen = [attacked(model, x, y, epsilon, steps, seed + number) for x, y in batches]
                for m in norms:
                    m.reset_running_stats()
                    m.momentum = None  # a plain average over all batches
                    m.train()
                with torch.no_grad():
                    for moved in seen:
                        model(moved)
        finally:
            for m, momentum in zip(norms, momenta, strict=True):
                m.momentum = momentum
