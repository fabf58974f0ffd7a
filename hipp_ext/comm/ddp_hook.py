"""The compressor under DistributedDataParallel.

    ddp.register_comm_hook(LQSGDState(ddp), lqsgd_hook)

Buckets only pass on their gradients. At the last one the whole model is exchanged at once, in one
order on all ranks, over a separate process group. This makes two messages per step, needs no
callbacks, and does not depend on how DDP fills its buckets. It gives up the overlap of
communication and backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from hipp_ext.comm.compressor import refuse_unusable
from hipp_ext.comm.naming import name_reduced
from hipp_ext.comm.state import LQSGDState
from hipp_ext.errors import CompressionError


# DDP checks the annotation of `bucket`.
def lqsgd_hook(state: LQSGDState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[reportPrivateImportUsage]
    """A DDP communication hook: `ddp.register_comm_hook(LQSGDState(ddp, rank=4), lqsgd_hook)`.

    Raises:
        CompressionError: gradients are sparse or complex, the ranks do not agree, the exchange
            failed, or `state` is not an LQSGDState.
    """
    if not isinstance(state, LQSGDState):
        raise CompressionError(
            f"lqsgd_hook was registered with {type(state).__name__}: use "
            "ddp.register_comm_hook(LQSGDState(ddp), lqsgd_hook)."
        )
    queue = state.queue
    if bucket.index() in {entry.index() for entry, _, _, _ in queue}:
        queue.clear()  # a backward pass was interrupted
    buffer, parameters = bucket.buffer(), bucket.parameters()
    known = state.is_laid_out
    names = [state.name_of(p) if known else f"{tuple(p.shape)}" for p in parameters]
    refuse_unusable({" and ".join(names): buffer})
    future: Any = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else [])
    queue.append((bucket, future, bucket.gradients(), parameters))
    if bucket.is_last():
        step, queue[:] = list(queue), []
        if not known:
            state.lay_out(_named([p for _, _, _, ps in step for p in ps], state))
        state.mean_(
            {state.name_of(p): g for _, _, gs, ps in step for g, p in zip(gs, ps, strict=True)}
        )
        for entry, waiting, _, _ in step:
            waiting.set_result(entry.buffer())
    return future


def register_lqsgd(ddp: Any, **options: Any) -> LQSGDState:
    """Make a state for `ddp`, register the hook, and return the state. A collective.

    Args:
        ddp: model wrapped in DistributedDataParallel, such as by accelerate's `prepare(model)`.
        options: keyword arguments of `LQSGDState`.

    Raises:
        CompressionError: `ddp` is not a DistributedDataParallel; see also `LQSGDState`.
    """
    ddp = getattr(ddp, "_orig_mod", ddp)  # under torch.compile
    if not isinstance(ddp, DistributedDataParallel):
        raise CompressionError(
            f"A DistributedDataParallel model is needed, this is {type(ddp).__name__}. With one "
            "process nothing is sent; start several with torchrun."
        )
    state = LQSGDState(ddp, process_group=ddp.process_group, **options)
    ddp.register_comm_hook(state, lqsgd_hook)
    return state


def mean_gradients(gradients: Sequence[Tensor], state: LQSGDState) -> None:
    """Replace each tensor of a list by its compressed mean over the ranks, without DDP.

    Args:
        gradients: tensors in the order that `state` was made with:
            `LQSGDState([p.grad for p in parameters])`.
        state: the state of this rank.

    Raises:
        CompressionError: another number of tensors, other shapes, or gradients that are sparse or
            complex.
    """
    names = state.names or [str(i) for i in range(len(gradients))]
    if len(gradients) != len(names):
        raise CompressionError(
            f"{len(gradients)} gradients were given, the state was made for {len(names)}."
        )
    state.mean_(dict(zip(names, gradients, strict=True)))


def _named(reduced: Sequence[Tensor], state: LQSGDState) -> dict[str, Tensor] | CompressionError:
    """The parameters by name, or the error, which all ranks have to receive."""
    try:
        return name_reduced(reduced, state)
    except CompressionError as error:
        return error
