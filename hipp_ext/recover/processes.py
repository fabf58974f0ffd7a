"""The processes of a run, and how each of them runs the model: accelerate's part of the loop."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hipp_ext.calibration import Batch
from hipp_ext.comm import LQSGDState, OuterLoop, lqsgd_hook
from hipp_ext.errors import HippError, MissingExtraError
from hipp_ext.groups import tower_layers
from hipp_ext.planner.evaluation import TIMEOUT
from hipp_ext.recover.counts import Counts
from hipp_ext.recover.objectives import Objective
from hipp_ext.recover.row_batches import RowBatch
from hipp_ext.recover.settings import RecoverSettings


def join_processes() -> tuple[int, int]:
    """Rank and number of the connected processes of `torchrun`; (0, 1) without it."""
    workers = int(os.environ.get("WORLD_SIZE", "1"))
    if workers > 1 and dist.is_available() and not dist.is_initialized():
        # The others wait while the first one evaluates tables; torchrun ends all if one dies.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    return (dist.get_rank(), dist.get_world_size()) if workers > 1 else (0, 1)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Batches of one forward pass and the weights of their losses."""

    batches: Sequence[Batch]
    weights: Sequence[Counts]


class WeightedLoss(nn.Module):
    """One forward pass for several batches, so that DDP reduces once, and FSDP gathers once."""

    def __init__(self, model: nn.Module, objective: Objective, device: torch.device):
        super().__init__()
        self.model, self.objective, self.device = model, objective, device

    def forward(self, part: Pass) -> list[dict[str, Tensor]]:
        """The losses of each batch by name: "loss" with its weights, the others without."""
        return [
            self.objective.losses(self.model, moved(batch, self.device), own)
            for batch, own in zip(part.batches, part.weights, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a run.

    Attributes:
        rank, workers: number of this process, and of all.
        accelerator: accelerate's Accelerator.
        sharded: whether parameters are spread over the processes.
    """

    rank: int
    workers: int
    accelerator: Any
    sharded: bool

    def wrap(
        self, loss: WeightedLoss, settings: RecoverSettings
    ) -> tuple[nn.Module, LQSGDState | None]:
        """(module that returns the losses of a pass, state of the compression if there is any)."""
        if self.sharded:
            from accelerate.utils import fsdp2_prepare_model

            return fsdp2_prepare_model(self.accelerator, loss), None
        local = settings.local_steps is not None  # then DDP has nothing to do
        wrapped = self.accelerator.prepare_model(loss, evaluation_mode=local)
        if self.workers == 1 or settings.compression == "none":
            return wrapped, None
        options = {name: getattr(settings, name) for name in ("rank", "bits", "transport", "seed")}
        state = LQSGDState(loss.model, **options)
        if not local:
            wrapped.register_comm_hook(state, lqsgd_hook)
        return wrapped, state

    def outer_loop(
        self, model: nn.Module, settings: RecoverSettings, state: LQSGDState | None
    ) -> OuterLoop | None:
        """What averages the changes of local steps; None without them, or with one process."""
        if self.workers == 1 or settings.local_steps is None:
            return None
        return OuterLoop(
            model, lr=settings.outer_lr, momentum=settings.outer_momentum, compression=state
        )

    def after_passes(self, loss: WeightedLoss) -> None:
        """Leave each process with its parts of a sharded model: passes without a backward pass keep
        some parameters whole."""
        for module in loss.modules():
            if self.sharded and hasattr(module, "reshard"):
                module.reshard()  # type: ignore[operator]

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.workers > 1:
            dist.barrier()

    def total(self, numbers: Sequence[float]) -> list[float]:
        """The sums of the numbers over the processes."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        if self.workers > 1:
            dist.all_reduce(sums)
        return sums.tolist()

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, in their order."""
        everyone: list[Any] = [value]
        if self.workers > 1:
            everyone = [None] * self.workers
            dist.all_gather_object(everyone, value)
        return everyone


@contextlib.contextmanager
def processes(model: nn.Module, settings: RecoverSettings, bf16: bool) -> Iterator[Processes]:
    """The processes that call `recover`: those of the default group, or this one.

    Raises:
        HippError: the model cannot be sharded, or torchrun started processes that are not
            connected.
        MissingExtraError: accelerate is not installed.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
    except ImportError:
        raise MissingExtraError("accelerate", "recover") from None
    several = dist.is_available() and dist.is_initialized()
    rank, workers = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > workers:
        raise HippError(
            f"torchrun started {started} processes, and they are not connected: call "
            'torch.distributed.init_process_group("gloo"), or "nccl" for GPUs, before recover.'
        )
    device, sharded = next(model.parameters()).device, settings.sharding == "fsdp"
    if sharded and workers == 1:
        raise HippError("sharding='fsdp' needs several processes: start them with torchrun.")
    plugin = _fsdp(model) if sharded else None
    with _own_state(rank, workers):
        accelerator = Accelerator(
            device_placement=False,  # the model is where it is to be trained
            mixed_precision="bf16" if bf16 else "no",
            # A model that will be spread over GPUs is on the CPU now.
            cpu=device.type == "cpu" and not (sharded and torch.cuda.is_available()),
            # VLMs usually have towers that a batch does not use, and layers that no batch uses.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
            fsdp_plugin=plugin,
        )
        if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
            # accelerate shards on GPUs only (1.15); torch does it on CPUs, too.
            if bf16:
                plugin.set_mixed_precision("bf16")
            accelerator.state.fsdp_plugin = plugin
            accelerator.state.distributed_type = DistributedType.FSDP
        yield Processes(rank=rank, workers=workers, accelerator=accelerator, sharded=sharded)


def _fsdp(model: nn.Module) -> Any:
    from accelerate import FullyShardedDataParallelPlugin

    layers = {type(layer).__name__ for layer in tower_layers(model, "language")}
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted(layers),
        cpu_ram_efficient_loading=False,
        reshard_after_forward=True,
    )


@contextlib.contextmanager
def _own_state(rank: int, workers: int) -> Iterator[None]:
    """Inside the block accelerate knows nothing of what the process did with it before.

    It keeps its state, such as the precision, for the whole process, and finds other processes by
    the variables that torchrun sets, which a group made in Python does not need.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = [s._shared_state for s in (PartialState, AcceleratorState, GradientState)]
    kept, variables = [dict(state) for state in states], dict(os.environ)
    for state in states:
        state.clear()
    if workers > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(workers))
        os.environ.setdefault("LOCAL_RANK", str(rank))
        os.environ.setdefault("LOCAL_WORLD_SIZE", str(workers))
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # or it would set another
    try:
        yield
    finally:
        for state, before in zip(states, kept, strict=True):
            state.clear()
            state.update(before)
        for name in set(os.environ) - set(variables):
            del os.environ[name]
        os.environ.update(variables)


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; some processors add plain values, which stay."""
    found = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.items()}
    rows = getattr(batch, "rows", None)
    return found if rows is None else RowBatch(found, rows)
