"""The training loop of `hipp recover`: one process, or DistributedDataParallel with compressed gradients or plain ones."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
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
from hipp_ext.plan import PruningPlan
from hipp_ext.quantities import finite, whole
from hipp_ext.recover.checkpoints import Checkpoints
from hipp_ext.recover.lessons import Lessons
from hipp_ext.surgery.masks import PLAN_ATTRIBUTE


@dataclass(frozen=True, kw_only=True)
class RecoverSettings:
    """How a pruned model is fine-tuned.

    Attributes:
        steps: of the optimizers.
        optimizer: "muon" for the hidden matrices of the language tower with AdamW for the rest, or "adamw" for all.
        rate: peak learning rate of AdamW.
        muon_rate: of Muon.
        clip: largest norm of the averaged gradient.
        compression: "lqsgd", or "none" for DDP's own all-reduce; one process sends nothing either way.
        rank, bits, vector_bits, transport: of LQ-SGD; see `hipp_ext.comm.Options`.
        freeze_vision: leave the vision tower as it is.
        seed: of dropout and first factors; the order of the data has its own.
        save_every: steps between checkpoints.

    Raises:
        HippError: a setting is out of range.
    """

    steps: int = 400
    optimizer: Literal["muon", "adamw"] = "muon"
    rate: float = 1e-3
    muon_rate: float = 0.01
    clip: float = 1.0
    compression: Literal["lqsgd", "none"] = "lqsgd"
    rank: int = 4
    bits: int = 8
    vector_bits: int | None = None
    transport: str = "auto"
    freeze_vision: bool = False
    seed: int = 0
    save_every: int = 50

    def __post_init__(self) -> None:
        for name, read in (
            ("steps", whole),
            ("save_every", whole),
            ("seed", whole),
            ("rate", finite),
            ("muon_rate", finite),
            ("clip", finite),
        ):
            if (number := read(getattr(self, name))) is None:
                kind = "whole" if read is whole else "finite"
                raise HippError(
                    f"RecoverSettings: {name}={getattr(self, name)!r}, a {kind} number is needed."
                )
            object.__setattr__(self, name, number)
        for name, least in (
            ("steps", 1),
            ("save_every", 1),
            ("rate", 0),
            ("muon_rate", 0),
            ("clip", 0),
        ):
            if not getattr(self, name) >= least:
                raise HippError(
                    f"RecoverSettings: {name}={getattr(self, name)!r}, at least {least} is needed."
                )
        for name, known in (("optimizer", ("muon", "adamw")), ("compression", ("lqsgd", "none"))):
            if getattr(self, name) not in known:
                raise HippError(
                    f"RecoverSettings: {name}={getattr(self, name)!r}, one of {', '.join(known)} is needed."
                )


@dataclass(frozen=True, kw_only=True)
class RecoverResult:
    """What a run came to.

    Attributes:
        losses: of every step, mean over the processes [nats, added up over a step's batches].
        stats: `LQSGDState.stats()`; None where nothing was compressed.
    """

    losses: list[float]
    stats: dict[str, Any] | None


def join_processes() -> tuple[int, int]:
    """Rank and number of the processes of `torchrun`, brought together; (0, 1) without it."""
    workers = int(os.environ.get("WORLD_SIZE", "1"))
    if workers > 1 and dist.is_available() and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if workers > 1 else (0, 1)


def recover(
    model: nn.Module,
    lessons: Lessons,
    settings: RecoverSettings,
    *,
    folder: str | Path,
    progress: bool = True,
) -> RecoverResult:
    """Fine-tune `model` in place; it ends in eval mode, the same on every process.

    Run by one process, or by all processes of a group. An interrupted run goes on from its last checkpoint, to the bit: the
    same command ends with the weights of an undisturbed run.

    Args:
        model: pruned, such as from `load_pruned`.
        lessons: what it learns from.
        settings: how.
        folder: for checkpoints, on a disk that all processes share. They are made of training data's gradients.
        progress: show a bar (first process).

    Raises:
        CheckpointError: `folder` holds another run, or is damaged.
        CompressionError: the processes have different models or settings, or one of them was lost.
        HippError: the loss is not finite.
    """
    several = dist.is_available() and dist.is_initialized()
    rank, workers = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    if settings.freeze_vision:
        _freeze_vision(model)
    wrapped: nn.Module = _SummedLoss(model)
    state = None
    if workers > 1:
        # Towers that a batch does not use, and layers that no batch uses, are usual in VLMs.
        wrapped = DistributedDataParallel(wrapped, find_unused_parameters=True)
        if settings.compression == "lqsgd":
            options = {
                k: getattr(settings, k)
                for k in ("rank", "bits", "vector_bits", "transport", "seed")
            }
            state = LQSGDState(model, **options)
            wrapped.register_comm_hook(state, lqsgd_hook)
    optimizers = _optimizers(model, settings)
    shapes = {n: list(p.shape) for n, p in model.named_parameters()}
    plan: PruningPlan | None = getattr(model, PLAN_ATTRIBUTE, None)
    run = {
        **asdict(settings),
        "workers": workers,
        "shapes": shapes,
        "plan": plan.to_json() if plan else None,
    }
    checkpoints = Checkpoints(
        Path(folder), run, rank, dist.barrier if workers > 1 else lambda: None
    )
    start, losses = checkpoints.load(model, optimizers, state)
    model.train()
    device = next(model.parameters()).device
    batches = lessons.batches(rank, workers, start)
    with _bar(progress and rank == 0, settings.steps, start) as show:
        for step in range(start, settings.steps):
            torch.manual_seed(
                settings.seed + 7919 * (step * workers + rank)
            )  # dropout, resumed alike
            losses.append(
                _step(wrapped, model, optimizers, settings, step, next(batches), device, workers)
            )
            show(losses[-1])
            if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
                checkpoints.save(step + 1, losses, model, optimizers, state)
    model.eval()
    return RecoverResult(losses=losses, stats=None if state is None else state.stats())


class _SummedLoss(nn.Module):
    """One forward for all batches of a step, so that DDP reduces once."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batches: list[Batch]) -> Tensor:
        losses: list[Tensor] = [self.model(**batch).loss for batch in batches]
        return torch.stack(losses).sum()


def _step(
    wrapped: nn.Module,
    model: nn.Module,
    optimizers: list[Any],
    settings: RecoverSettings,
    step: int,
    batches: list[Batch],
    device: torch.device,
    workers: int,
) -> float:
    loss = wrapped([{k: v.to(device) for k, v in b.items()} for b in batches])
    loss.backward()
    mean = loss.detach().double().cpu() / workers
    if workers > 1:
        dist.all_reduce(mean)
    if not bool(mean.isfinite()):
        raise HippError(
            f"The loss of step {step + 1} is {mean.item()}: a smaller rate may help (--rate, --muon-rate)."
        )
    nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    share = min(
        1.0,
        (step + 1) / min(30, max(1, settings.steps // 10)),
        (settings.steps - step) / (0.7 * settings.steps),
    )
    for optimizer, rate in zip(optimizers, (settings.rate, settings.muon_rate), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        optimizer.step()
        optimizer.zero_grad()
    return mean.item()


def _optimizers(model: nn.Module, settings: RecoverSettings) -> list[Any]:
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    hidden = {
        id(p) for n, p in trained if p.dim() == 2 and settings.optimizer == "muon" and _is_hidden(n)
    }
    rest = [p for _, p in trained if id(p) not in hidden]
    made: list[Any] = [
        torch.optim.AdamW(rest, lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.01)
    ]
    if hidden:
        matrices = [p for _, p in trained if id(p) in hidden]
        made.append(torch.optim.Muon(matrices, lr=settings.muon_rate, weight_decay=0.01))
    return made


def _is_hidden(name: str) -> bool:
    return ".layers." in name and "vision" not in name and "visual" not in name


def _freeze_vision(model: nn.Module) -> None:
    found = [p for n, p in model.named_parameters() if "vision" in n or "visual" in n]
    if not found:
        raise HippError(f"{type(model).__name__} has no parameters of a vision tower to freeze.")
    for p in found:
        p.requires_grad_(False)


@contextlib.contextmanager
def _bar(show: bool, steps: int, start: int) -> Iterator[Callable[[float], None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not show) as bar:
        task = bar.add_task("recovering", total=steps, completed=start)
        counter = itertools.count(start + 1)
        yield lambda loss: bar.update(
            task, completed=next(counter), description=f"recovering, loss {loss:.3f}"
        )
