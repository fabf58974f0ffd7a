"""The compressor under DistributedDataParallel: `ddp.register_comm_hook(LQSGDState(ddp), lqsgd_hook)`.

Buckets only hand their gradients over; at the last one the whole model is exchanged at once, in one order on all ranks, over a
process group of its own. That makes two messages a step, needs no callbacks, and does not depend on how DDP fills buckets. It
gives up the overlap of communication and backward pass.
"""

import datetime
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hipp_ext.comm.compressor import Compressor, Options, refuse_unusable
from hipp_ext.comm.saving import pack_state, unpack_state
from hipp_ext.comm.transports import run_in_group
from hipp_ext.errors import CompressionError

Parameters = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | Sequence[Tensor]
_WRAPPERS = ("module.", "_orig_mod.")  # what DDP and torch.compile put before a parameter's name


class LQSGDState:
    """One rank's compressor, its memory and its counts. Making one is a collective: every rank of the group makes its own.

    Args:
        parameters: the model (wrapped in DDP or not), its named parameters, or a list of tensors.
        process_group: whose ranks average; None: all. A group of its own, with the same ranks, carries the bytes.
        timeout: after which a lost rank is an error; None: the default of torch.distributed.
        options: of `Options`: rank, bits, vector_bits, alpha, transport, min_rate, seed.

    Raises:
        CompressionError: torch.distributed is not initialised, an option is out of range, there is nothing to train,
            parameters are complex, or the ranks' parameters or options differ.

    No privacy guarantee: see the README's word on gradient inversion. What `state_dict` returns is made of this rank's data.
    """

    def __init__(
        self,
        parameters: Parameters,
        *,
        process_group: Any = None,
        timeout: datetime.timedelta | None = None,
        **options: Any,
    ):
        if not (dist.is_available() and dist.is_initialized()):
            raise CompressionError("LQSGDState needs torch.distributed: call init_process_group, or start with torchrun.")
        named = name_parameters(parameters)
        self._names = {id(p): name for name, p in named.items()}
        self._tensors = named  # kept alive, so that ids stay theirs
        ranks = dist.get_process_group_ranks(process_group or dist.group.WORLD)
        self.group: Any = dist.new_group(ranks, timeout=timeout, use_local_synchronization=process_group is not None)
        shapes = {name: p.shape for name, p in named.items()}
        chosen = _agree(self.group, shapes, options)
        self.compressor = Compressor(
            shapes, chosen, workers=len(ranks), position=dist.get_rank(self.group), device=next(iter(named.values())).device
        )
        self._element_bytes = {name: p.element_size() for name, p in named.items()}
        self._counts = {"steps": 0, "skipped_steps": 0, "bytes_sent": 0, "dense_bytes": 0}
        self._last = {"bytes_sent": 0, "dense_bytes": 0}
        self._loss_scale = 1.0
        self._queue: list[tuple[Any, Any, list[Tensor], list[Tensor]]] = []

    def mean_(self, gradients: Mapping[str, Tensor]) -> None:
        """Replace each gradient by its compressed mean over the ranks; bit-identical on all of them.

        Where any rank's gradients are not finite, all ranks get NaN everywhere (so GradScaler skips the step), a warning says
        so once, and the memory stays as it was.

        Raises:
            CompressionError: other names or shapes, gradients that are sparse or complex, or the exchange failed.
        """
        means, sent = run_in_group(self.compressor.step(gradients), self.group)
        dense = self._dense_bytes()
        self._last = {"bytes_sent": sent, "dense_bytes": dense}
        for name, value in (("steps", 1), ("skipped_steps", means is None), ("bytes_sent", sent), ("dense_bytes", dense)):
            self._counts[name] += int(value)
        if means is None and self._counts["skipped_steps"] == 1:
            warnings.warn("Gradients of a rank are not finite: all ranks get NaN for this step.", stacklevel=2)
        for name, gradient in gradients.items():
            gradient.detach().fill_(torch.nan) if means is None else gradient.detach().copy_(means[name])

    def stats(self) -> dict[str, Any]:
        """Bytes this rank sent to others, and what fp32 or half-precision ring all-reduce of its gradients would have sent.

        Keys: steps, skipped_steps, bytes_sent and dense_bytes (in total); bytes_sent_last_step and dense_bytes_last_step;
        message_bytes (one copy of a step's messages); transport, workers.
        """
        last = {f"{name}_last_step": value for name, value in self._last.items()}
        c = self.compressor
        return {**self._counts, **last, "message_bytes": c.message_bytes, "transport": c.transport, "workers": c.workers}

    def set_loss_scale(self, scale: float) -> None:
        """Say by how much the loss is scaled (GradScaler.get_scale()), so that the memory keeps up when that changes.

        Without it a change of scale weighs what is in memory wrongly for one step.
        """
        if not (0 < scale < float("inf")):
            raise CompressionError(f"The loss scale {scale!r} is not a finite number above 0.")
        for memory in self.compressor.memory.values():
            memory.mul_(scale / self._loss_scale)
        self._loss_scale = float(scale)

    def state_dict(self) -> dict[str, Any]:
        """This rank's memory and counts: tensors and plain types, keyed by parameter name. Each rank saves its own."""
        return pack_state(self.compressor, {**self._counts, "loss_scale": self._loss_scale})

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Go on from what `state_dict` returned on this rank, to the bit.

        Saved with another number of workers, the shared factors are taken over and this rank's memory is set to zero.

        Returns:
            What had to be dropped, in words; empty where nothing was. The same is warned of.

        Raises:
            CompressionError: the state is malformed, of another rank, or of other parameters.
        """
        counts, dropped = unpack_state(self.compressor, state)
        self._loss_scale = float(counts.pop("loss_scale", 1.0))
        self._counts |= counts
        for line in dropped:
            warnings.warn(line, stacklevel=2)
        return dropped

    def _dense_bytes(self) -> int:
        workers = self.compressor.workers
        one_copy = sum(size * self._tensors[name].numel() for name, size in self._element_bytes.items())
        return round(2 * (workers - 1) / workers * one_copy)

    def _take(self, bucket: Any) -> torch.futures.Future:
        if bucket.index() in {entry[0].index() for entry in self._queue}:
            self._queue.clear()  # a backward pass was broken off
        buffer = bucket.buffer()
        refuse_unusable({" and ".join(map(self._name, bucket.parameters())): buffer})
        future: Any = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else [])
        self._queue.append((bucket, future, bucket.gradients(), bucket.parameters()))
        if bucket.is_last():
            queue, self._queue = self._queue, []
            self.mean_({self._name(p): g for _, _, gs, ps in queue for g, p in zip(gs, ps, strict=True)})
            for entry, waiting, _, _ in queue:
                waiting.set_result(entry.buffer())
        return future

    def _name(self, parameter: Tensor) -> str:
        if id(parameter) not in self._names:
            raise CompressionError(
                f"DDP reduces a parameter of shape {tuple(parameter.shape)} that LQSGDState was not made with: give it the "
                "model that DDP wraps, as it is when DDP wraps it."
            )
        return self._names[id(parameter)]


# DDP checks the annotation of `bucket`.
def lqsgd_hook(state: LQSGDState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[reportPrivateImportUsage]
    """A DDP communication hook: `ddp.register_comm_hook(LQSGDState(ddp, rank=4, bits=8), lqsgd_hook)`.

    Raises:
        CompressionError: gradients are sparse or complex, or the exchange failed.
    """
    return state._take(bucket)


def register_lqsgd(ddp: Any, **options: Any) -> LQSGDState:
    """Make the state for a DDP-wrapped model, register the hook on it, and return the state; every rank does so.

    Args:
        ddp: as DDP(model), or accelerate's `prepare(model)`, returns it.
        options: of `LQSGDState`.

    Raises:
        CompressionError: `ddp` is not wrapped in DDP, as happens with a single process; or see `LQSGDState`.
    """
    if not isinstance(ddp, nn.parallel.DistributedDataParallel):
        raise CompressionError(
            f"A DistributedDataParallel model is needed, this is {type(ddp).__name__}. With one process nothing is sent; start "
            "with torchrun."
        )
    state = LQSGDState(ddp, process_group=ddp.process_group, **options)
    ddp.register_comm_hook(state, lqsgd_hook)
    return state


def mean_gradients(gradients: Sequence[Tensor], state: LQSGDState) -> None:
    """Without DDP: replace each tensor of a list by its compressed mean over the ranks.

    Args:
        gradients: in the order of the tensors that `state` was made with: `LQSGDState([p.grad for p in parameters])`.
        state: of this rank.

    Raises:
        CompressionError: another number of tensors, other shapes, or gradients that are sparse or complex.
    """
    names = list(state._tensors)
    if len(gradients) != len(names):
        raise CompressionError(f"{len(gradients)} gradients were given, the state was made for {len(names)}.")
    state.mean_(dict(zip(names, gradients, strict=True)))


def name_parameters(parameters: Parameters) -> dict[str, Tensor]:
    """Name -> parameter that is trained; names as in the unwrapped model, numbers for a list of tensors."""
    pairs: list[Any]
    if isinstance(parameters, nn.Module):
        pairs = [(name, p) for name, p in parameters.named_parameters() if p.requires_grad]
    elif isinstance(parameters, Mapping):
        pairs = list(parameters.items())
    else:
        pairs = [p if isinstance(p, tuple) else (str(i), p) for i, p in enumerate(parameters)]
    named = {_unwrapped(name): p for name, p in pairs}
    if not named or len(named) < len(pairs):
        raise CompressionError(f"{len(pairs)} parameters with {len(named)} different names were given; at least one is needed.")
    for name, p in named.items():
        if not p.is_floating_point():
            raise CompressionError(f"{name} is {p.dtype}: only real floating-point gradients can be compressed.")
    return named


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _agree(group: Any, shapes: Mapping[str, Sequence[int]], options: Mapping[str, Any]) -> Options:
    """The options, once all ranks have told what they have, so that none waits for one that has given up."""
    try:
        chosen, problem = Options(**options), None
    except (CompressionError, TypeError) as error:
        chosen, problem = Options(), str(error)
    mine = {"problem": problem, **chosen.plain(), **{f"shape of {n}": list(s) for n, s in shapes.items()}}
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    for rank, theirs in enumerate(everyone):
        if theirs["problem"] is not None:
            raise CompressionError(f"Rank {rank}: {theirs['problem']}")
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0] or list(theirs) != list(everyone[0]):
            key = next((k for k in {**everyone[0], **theirs} if everyone[0].get(k) != theirs.get(k)), "the parameters' order")
            raise CompressionError(
                f"The ranks do not compress alike: {key} is {everyone[0].get(key)} on rank 0, {theirs.get(key)} on rank {rank}."
            )
    return chosen
