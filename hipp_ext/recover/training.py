"""The training loop of `hipp recover`: one process, or DDP with compressed or plain gradients."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hipp_ext.calibration import Batch
from hipp_ext.comm import LQSGDState, lqsgd_hook
from hipp_ext.errors import HippError
from hipp_ext.files.sealed import text_digest
from hipp_ext.plan import PruningPlan
from hipp_ext.progress import progress_bar
from hipp_ext.quantities import finite_option, whole_option
from hipp_ext.recover.checkpoints import Checkpoints
from hipp_ext.recover.data import DataSource
from hipp_ext.surgery.masks import PLAN_ATTRIBUTE
from hipp_ext.training import lr_factor, make_optimizers, step_optimizers

CHOICES = {"optimizer": ("muon", "adamw"), "compression": ("lqsgd", "none")}


@dataclass(frozen=True, kw_only=True)
class RecoverSettings:
    """How a pruned model is fine-tuned.

    Attributes:
        steps: optimizer steps.
        optimizer: "muon": Muon for the hidden matrices of the language model and AdamW for the
            rest; "adamw": AdamW for all parameters.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon.
        clip: largest norm of the averaged gradient.
        compression: "lqsgd", or "none" for DDP's own all-reduce. One process sends nothing.
        rank, bits, transport: options of LQ-SGD; see `hipp_ext.comm.Options`.
        freeze_vision: whether the vision tower stays as it is.
        seed: random seed of dropout and of the first factors; the data source has its own.
        save_every: steps between checkpoints.

    Raises:
        HippError: a setting is out of range.
    """

    steps: int = 400
    optimizer: Literal["muon", "adamw"] = "muon"
    lr: float = 1e-3
    muon_lr: float = 0.01
    clip: float = 1.0
    compression: Literal["lqsgd", "none"] = "lqsgd"
    rank: int = 4
    bits: int = 8
    transport: str = "auto"
    freeze_vision: bool = False
    seed: int = 0
    save_every: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "save_every"):
            value = whole_option(name, getattr(self, name), HippError, 1)
            object.__setattr__(self, name, value)
        for name in ("lr", "muon_lr", "clip"):
            value = finite_option(name, getattr(self, name), HippError, zero=True)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "seed", whole_option("seed", self.seed, HippError, -(2**63)))
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise HippError(
                    f"{name}={getattr(self, name)!r}: one of {', '.join(known)} is needed."
                )


@dataclass(frozen=True, kw_only=True)
class RecoverResult:
    """The result of a run.

    Attributes:
        losses: loss of every step, mean over the processes [nats, summed over a step's batches].
        stats: `LQSGDState.stats()`; None if nothing was compressed.
    """

    losses: list[float]
    stats: dict[str, Any] | None


def join_processes() -> tuple[int, int]:
    """Rank and number of the connected processes of `torchrun`; (0, 1) without it."""
    workers = int(os.environ.get("WORLD_SIZE", "1"))
    if workers > 1 and dist.is_available() and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if workers > 1 else (0, 1)


def recover(
    model: nn.Module,
    data: DataSource,
    settings: RecoverSettings,
    *,
    folder: str | Path,
    progress: bool = True,
) -> RecoverResult:
    """Fine-tune `model` in place; it ends in eval mode, equal on every process.

    One process calls this, or all processes of a group. An interrupted run goes on from its last
    checkpoint: the same call ends with the weights of an undisturbed run, bit for bit.

    Args:
        model: pruned model, such as from `load_pruned`.
        data: data source.
        settings: how the model is fine-tuned.
        folder: folder for checkpoints, on a disk that all processes share. Checkpoints contain
            gradients of the training data.
        progress: whether the first process shows a progress bar.

    Raises:
        CheckpointError: `folder` holds another run, or is damaged.
        OutputBusyError: another process works in `folder`.
        CompressionError: the processes have different models or settings, or one was lost.
        HippError: the loss is not finite.
    """
    several = dist.is_available() and dist.is_initialized()
    rank, workers = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    if settings.freeze_vision:
        _freeze_vision(model)
    wrapped, state = _wrap(model, settings, workers)
    muon_lr = settings.muon_lr if settings.optimizer == "muon" else None
    optimizers = make_optimizers(model, settings.lr, muon_lr)
    barrier = dist.barrier if workers > 1 else lambda: None
    checkpoints = Checkpoints(Path(folder), _identity(model, settings, workers), rank, barrier)
    with (
        checkpoints.run,
        progress_bar(progress and rank == 0, "recovering", settings.steps) as show,
    ):
        start, losses = checkpoints.load(model, optimizers, state)
        model.train()
        batches = data.batches(rank, workers, start)
        for step in range(start, settings.steps):
            # A seed per step, so that dropout is the same in a resumed run.
            torch.manual_seed(settings.seed + 7919 * (step * workers + rank))
            losses.append(_backward(wrapped, model, step, next(batches), workers))
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            warmup = min(30, max(1, settings.steps // 10))
            step_optimizers(optimizers, lr_factor(step, settings.steps, warmup=warmup, decay=0.7))
            show(step + 1, f"loss {losses[-1]:.3f}")
            if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
                checkpoints.save(step + 1, losses, model, optimizers, state)
    model.eval()
    return RecoverResult(losses=losses, stats=None if state is None else state.stats())


class _SummedLoss(nn.Module):
    """One forward pass for all batches of a step, so that DDP reduces once."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batches: list[Batch]) -> Tensor:
        losses: list[Tensor] = [self.model(**batch).loss for batch in batches]
        return torch.stack(losses).sum()


def _wrap(
    model: nn.Module, settings: RecoverSettings, workers: int
) -> tuple[nn.Module, LQSGDState | None]:
    """(module that returns the loss of a step, state of the compression if there is any)."""
    if workers == 1:
        return _SummedLoss(model), None
    # VLMs usually have towers that a batch does not use, and layers that no batch uses.
    wrapped = DistributedDataParallel(_SummedLoss(model), find_unused_parameters=True)
    if settings.compression == "none":
        return wrapped, None
    options = {k: getattr(settings, k) for k in ("rank", "bits", "transport", "seed")}
    state = LQSGDState(model, **options)
    wrapped.register_comm_hook(state, lqsgd_hook)
    return wrapped, state


def _identity(model: nn.Module, settings: RecoverSettings, workers: int) -> dict[str, Any]:
    plan: PruningPlan | None = getattr(model, PLAN_ATTRIBUTE, None)
    return {
        **asdict(settings),
        "processes": workers,
        "plan": text_digest(plan.to_json()) if plan else None,
        "shapes": {n: list(p.shape) for n, p in model.named_parameters()},
    }


def _backward(
    wrapped: nn.Module, model: nn.Module, step: int, batches: list[Batch], workers: int
) -> float:
    """The loss of a step, mean over the processes, after the backward pass."""
    device = next(model.parameters()).device
    loss = wrapped([{k: v.to(device) for k, v in b.items()} for b in batches])
    loss.backward()
    mean = loss.detach().double().cpu() / workers
    if workers > 1:
        dist.all_reduce(mean)
    if not bool(mean.isfinite()):
        raise HippError(
            f"The loss of step {step + 1} is {mean.item()}: a smaller learning rate may help "
            "(--lr, --muon-lr)."
        )
    return mean.item()


def _freeze_vision(model: nn.Module) -> None:
    found = [p for n, p in model.named_parameters() if "vision" in n or "visual" in n]
    if not found:
        raise HippError(f"{type(model).__name__} has no parameters of a vision tower to freeze.")
    for p in found:
        p.requires_grad_(False)
