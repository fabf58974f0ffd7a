"""Adversarial training that goes on after a kill to the same weights, and the recalibration of batch norms."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hipp_ext.attacks import check_precision
from hipp_ext.errors import AttackError, CheckpointError, DataError, UnsupportedModelError
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import seal, unseal
from hipp_ext.quantities import take_numbers
from hipp_ext.robust.data import ImageData, Images, check_images
from hipp_ext.robust.identity import data_identity, describe, digest
from hipp_ext.robust.losses import AdversarialLoss, attacked, backward

MOMENTUM = 0.9
WARM_UP = 0.3  # share of the steps in which the rate rises
PARTS = {
    "settings": "other settings",
    "model": "another model",
    "data": "other data",
    "loss": "another loss",
}


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train: SGD with Nesterov momentum, one cycle of the learning rate, random shifts (and mirrors where they keep the
    class).

    Attributes:
        epochs, batch_size, rate, weight_decay: of SGD; the rate rises from rate / 25 over 30% of the steps and falls to almost
            zero.
        seed: of order, shifts, attacks and dropout.
    """

    epochs: int = 15
    batch_size: int = 128
    rate: float = 0.05
    weight_decay: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        take_numbers(
            self,
            DataError,
            wholes=("epochs", "batch_size", "seed"),
            finites=("rate", "weight_decay"),
        )
        if self.epochs < 0 or self.batch_size < 1 or not self.rate > 0:
            raise DataError(
                f"Training needs epochs >= 0, batch_size >= 1 and rate > 0, got {self}."
            )


Report = Callable[[int, float], None]  # (epochs done, mean loss of the last)


def train(
    model: nn.Module,
    data: ImageData,
    loss: AdversarialLoss,
    settings: TrainSettings,
    *,
    checkpoint: Path | None = None,
    report: Report | None = None,
) -> list[float]:
    """Train `model` in place; the mean loss of every epoch. The same settings give the same weights to the bit, on a CPU with
    as many threads.

    Args:
        model: floating point of 32 bits or more; train/eval and requires_grad are as before afterwards, frozen weights stay.
        data: its training images; the test images are not looked at.
        loss: see `hipp_ext.robust.losses`; called in train mode.
        checkpoint: written after every epoch (safetensors); an interrupted call goes on from it, to the weights that an
            undisturbed one ends with. It belongs to these settings, weights, images and this loss, and serves no other call.
        report: called after every epoch.

    Raises:
        UnsupportedModelError: the model is in half precision, or nothing of it requires gradients.
        AttackError: the loss became NaN or infinite.
        DataError: `checkpoint` belongs to other settings, another model, other data or another loss, or is damaged.
    """
    check_precision(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise UnsupportedModelError(
            f"No weight of this {type(model).__name__} requires gradients; there is nothing to train."
        )
    check_images(data.train, len(data.classes), f"{data.name} train")
    identity = _identity(model, data, loss, settings) if checkpoint is not None else {}
    run = _Run(
        model, parameters, settings, math.ceil(len(data.train) / settings.batch_size), identity
    )
    history = run.load(checkpoint) if checkpoint is not None and checkpoint.exists() else []
    with restored(model):
        model.train()
        for epoch in range(len(history), settings.epochs):
            history.append(_epoch(model, data, loss, settings, run, epoch))
            if checkpoint is not None:
                run.save(checkpoint, history)
            if report is not None:
                report(len(history), history[-1])
    return history


def _identity(
    model: nn.Module, data: ImageData, loss: AdversarialLoss, settings: TrainSettings
) -> dict[str, Any]:
    # Not the buffers: batch norms that were measured again under attack may differ in their last bits.
    start = digest(dict(model.named_parameters()))
    return {
        "settings": asdict(settings),
        "model": start,
        "data": data_identity(data),
        "loss": describe(loss),
    }


def _epoch(
    model: nn.Module,
    data: ImageData,
    loss: AdversarialLoss,
    settings: TrainSettings,
    run: "_Run",
    epoch: int,
) -> float:
    # One seed per epoch: where a run was killed makes no difference.
    seed = settings.seed * 1_000_003 + epoch
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout draws from the global state, which `restored` puts back
    order = torch.randperm(len(data.train), generator=generator)
    device = next(model.parameters()).device
    total = 0.0
    for start in range(0, len(order), settings.batch_size):
        images, labels = data.train.rows(order[start : start + settings.batch_size])
        images = augment(images, data, generator).to(device)
        value = backward(loss, model, images, labels.to(device), seed * 7919 + start)
        if not math.isfinite(value):
            raise AttackError(
                f"The training loss is {value} in epoch {epoch + 1}; lower the learning rate ({settings.rate})."
            )
        run.step()
        total += value * len(labels)
    return total / len(order)


class _Run:
    """SGD with its momentum and its place in the cycle, in a form that goes into a file."""

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        settings: TrainSettings,
        per_epoch: int,
        identity: dict[str, Any],
    ):
        self.identity = identity
        self.model, self.settings, self.per_epoch, self.done = model, settings, per_epoch, 0
        self.optimizer = torch.optim.SGD(
            parameters,
            lr=settings.rate,
            momentum=MOMENTUM,
            nesterov=True,
            weight_decay=settings.weight_decay,
        )
        self.optimizer.zero_grad()
        self.parameters = parameters

    def step(self) -> None:
        self.optimizer.param_groups[0]["lr"] = cycle(
            self.settings.rate, self.done, self.settings.epochs * self.per_epoch
        )
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
            belongs = {part: there.get(part) == self.identity[part] for part in PARTS}
        except (CheckpointError, KeyError, AttributeError) as error:
            raise DataError(
                f"{path} is no checkpoint of a training run, or damaged: {error} Remove it to begin again."
            ) from error
        for part, words in PARTS.items():
            if not belongs[part]:
                raise DataError(f"{path} belongs to {words}. Remove it, or choose another folder.")
        state = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        self.model.load_state_dict(state)
        for i, p in enumerate(self.parameters):
            if f"momentum.{i}" in tensors:
                self.optimizer.state[p]["momentum_buffer"] = tensors[f"momentum.{i}"].to(p.device)
        self.done = len(history) * self.per_epoch
        return history


def cycle(rate: float, step: int, steps: int) -> float:
    """The learning rate at a step: cosine up from rate / 25, cosine down to rate / 10,000."""
    peak = max(1.0, WARM_UP * steps)
    if step < peak:
        return rate / 25 + (rate - rate / 25) * (1 - math.cos(math.pi * step / peak)) / 2
    return (
        rate / 1e4
        + (rate - rate / 1e4) * (1 + math.cos(math.pi * (step - peak) / max(1.0, steps - peak))) / 2
    )


def augment(images: Tensor, data: ImageData, generator: torch.Generator) -> Tensor:
    """Every picture shifted by up to `data.pad` pixels, with black borders, and mirrored half the time where `data.mirror`."""
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
    """Measure the statistics of batch norms again, on images attacked at the model as it is; weights stay.

    After channels were removed a network answers at chance, and an inner attack in eval mode would attack that.

    Args:
        passes: each attacks the model that the one before left.
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    momenta = [m.momentum for m in norms]
    device = next(model.parameters()).device
    with restored(model):
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


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Random state, train/eval flags and requires_grad are after the block as they were before it."""
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for p, flag in flags:
                p.requires_grad_(flag)
