"""Adversarial training that resumes to the same weights, and the recalibration of batch norms."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hipp_ext.attacks import check_precision
from hipp_ext.errors import AttackError, CheckpointError, DataError, UnsupportedModelError
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import seal, unseal
from hipp_ext.modes import restored
from hipp_ext.quantities import take_numbers
from hipp_ext.robust.data import ImageData, Images, check_images
from hipp_ext.robust.losses import AdversarialLoss, attacked, backward

MOMENTUM = 0.9
WARM_UP = 0.3  # fraction of the steps in which the learning rate rises
IDENTITY = {
    "settings": "other settings",
    "model": "another model",
    "data": "other data",
    "loss": "another loss",
}  # what a checkpoint belongs to, and how an error calls a difference


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of the training: SGD with Nesterov momentum and one cycle of the learning rate.

    Images are shifted at random, and mirrored where that keeps the class.

    Attributes:
        epochs: number of epochs.
        batch_size: images per step.
        lr: largest learning rate; it rises from lr / 25 over 30% of the steps and falls to
            almost 0.
        weight_decay: of SGD.
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
    checkpoint: Path | None = None,
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
        checkpoint: file that is written after every epoch (safetensors). An interrupted call
            resumes from it, and ends with the weights of an uninterrupted one. It belongs to these
            settings, weights and images, and to this loss (as its repr gives it), and no other call
            takes it.
        on_epoch: called after every epoch.

    Raises:
        UnsupportedModelError: the model is in half precision, or nothing of it requires gradients.
        AttackError: the loss became NaN or infinite.
        DataError: `checkpoint` belongs to other settings, another model, other data or another
            loss, or is damaged.
    """
    check_precision(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise UnsupportedModelError(
            f"No weight of this {type(model).__name__} requires gradients; there is nothing to "
            "train."
        )
    check_images(data.train, len(data.classes), f"{data.name} train")
    run = _Run(model, parameters, settings, math.ceil(len(data.train) / settings.batch_size))
    history: list[float] = []
    if checkpoint is not None:
        run.identity = _identity(model, data, loss, settings)
        history = run.load(checkpoint) if checkpoint.exists() else []
    with restored(model, random_state=True):
        model.train()
        for epoch in range(len(history), settings.epochs):
            history.append(_epoch(model, data, loss, settings, run, epoch))
            if checkpoint is not None:
                run.save(checkpoint, history)
            if on_epoch is not None:
                on_epoch(len(history), history[-1])
    return history


def _epoch(
    model: nn.Module,
    data: ImageData,
    loss: AdversarialLoss,
    settings: TrainSettings,
    run: "_Run",
    epoch: int,
) -> float:
    # Every epoch has its own seed, so that it does not matter where a run was interrupted.
    seed = settings.seed * 1_000_003 + epoch
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout draws from the global state, which `train` restores
    order = torch.randperm(len(data.train), generator=generator)
    device = next(model.parameters()).device
    total = 0.0
    for start in range(0, len(order), settings.batch_size):
        images, labels = data.train.rows(order[start : start + settings.batch_size])
        images = augment(images, data, generator).to(device)
        value = backward(loss, model, images, labels.to(device), seed * 7919 + start)
        if not math.isfinite(value):
            raise AttackError(
                f"The training loss is {value} in epoch {epoch + 1}; lower the learning rate "
                f"({settings.lr})."
            )
        run.step()
        total += value * len(labels)
    return total / len(order)


class _Run:
    """SGD with its momentum and its position in the cycle, which can be saved and loaded."""

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        settings: TrainSettings,
        per_epoch: int,
    ):
        self.model, self.parameters, self.settings = model, parameters, settings
        self.per_epoch, self.done, self.identity = per_epoch, 0, {}
        self.optimizer = torch.optim.SGD(
            parameters,
            lr=settings.lr,
            momentum=MOMENTUM,
            nesterov=True,
            weight_decay=settings.weight_decay,
        )
        self.optimizer.zero_grad()

    def step(self) -> None:
        steps = self.settings.epochs * self.per_epoch
        self.optimizer.param_groups[0]["lr"] = cycle(self.settings.lr, self.done, steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1

    def save(self, path: Path, history: list[float]) -> None:
        tensors = {f"model.{n}": t.contiguous() for n, t in self.model.state_dict().items()}
        for i, p in enumerate(self.parameters):
            if (momentum := self.optimizer.state[p].get("momentum_buffer")) is not None:
                tensors[f"momentum.{i}"] = momentum
        write_atomic(path, seal(tensors, {"identity": self.identity, "history": history}))

    def load(self, path: Path) -> list[float]:
        try:
            tensors, about = unseal(path)
            there, history = about["identity"], about["history"]
            belongs = {part: there.get(part) == self.identity[part] for part in IDENTITY}
        except (CheckpointError, KeyError, AttributeError) as error:
            raise DataError(
                f"{path} is not a training checkpoint, or it is damaged ({error}). Delete it to "
                "start over."
            ) from error
        for part, words in IDENTITY.items():
            if not belongs[part]:
                raise DataError(f"{path} belongs to {words}. Delete it, or choose another folder.")
        state = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        self.model.load_state_dict(state)
        for i, p in enumerate(self.parameters):
            if f"momentum.{i}" in tensors:
                self.optimizer.state[p]["momentum_buffer"] = tensors[f"momentum.{i}"].to(p.device)
        self.done = len(history) * self.per_epoch
        return history


def _identity(
    model: nn.Module, data: ImageData, loss: AdversarialLoss, settings: TrainSettings
) -> dict[str, Any]:
    # Not the buffers: batch norms that were measured again under attack may differ in the last bit.
    return {
        "settings": asdict(settings),
        "model": tensor_digest(dict(model.named_parameters())),
        "data": data_identity(data),
        "loss": loss_identity(loss),
    }


def data_identity(data: ImageData) -> dict[str, Any]:
    """What distinguishes training images from others, as plain values."""
    train = {"images": data.train.images, "labels": data.train.labels}
    return {
        "name": data.name,
        "rows": len(data.train),
        "digest": tensor_digest(train),
        "pad": data.pad,
        "mirror": data.mirror,
    }


def loss_identity(loss: AdversarialLoss) -> str:
    """The repr of a loss without addresses: class and settings, or the function's name."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(loss))


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hex digest of names, shapes, dtypes and values."""
    result = hashlib.sha256()
    for name, tensor in tensors.items():
        result.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        result.update(flat.view(torch.uint8).numpy().data)
    return result.hexdigest()


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
