"""Local steps: every process trains alone, and from time to time all average what has changed.

outer = OuterLoop(model)
outer.begin()
for step, batch in enumerate(batches):
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if (step + 1) % 32 == 0:
        outer.exchange()
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.model_averaging.utils import average_parameters

from hipp_ext.comm.group import gather_objects
from hipp_ext.comm.naming import Parameters, name_parameters
from hipp_ext.comm.state import LQSGDState
from hipp_ext.errors import CompressionError
from hipp_ext.files.sealed import digest
from hipp_ext.quantities import finite_option


class OuterLoop:
    """The part of DiLoCo that all processes do together; each trains alone with its own optimizer.

    An exchange averages what every process changed since the last one, and lets SGD, with Nesterov
    momentum if wanted, apply the mean to the common parameters. Then all processes go on from
    these. It takes two copies of the parameters as memory, and a third one with momentum.

    Args:
        parameters: the model, not wrapped in DDP, or its named parameters; see `LQSGDState`.
        lr: learning rate of the outer SGD; 1 without momentum is plain averaging. The parameters
            move by up to lr / (1 - momentum) times the mean change, if changes have one direction.
        momentum: momentum of the outer SGD, below 1.
        compression: state that sends the changes with LQ-SGD, made of the same parameters; None:
            float32 (or the type of the parameters) and an all-reduce.
        process_group: group of the processes that average; None: all. With `compression`, its
            group is used.

    Attributes:
        optimizer: the outer SGD; its momentum belongs in a checkpoint.
        exchanges: number of exchanges so far.

    Raises:
        CompressionError: a number is out of range, or there is nothing to train.

    Source: DiLoCo (arXiv 2311.08105), algorithm 1.
    Differs from the paper: any inner optimizer, and changes may be compressed, with error feedback
        from one exchange to the next. The default is plain averaging. The paper has lr 0.7 and
        momentum 0.9, for 500 steps between exchanges: after few steps the changes are alike, and
        so much momentum overshoots.
    """

    def __init__(
        self,
        parameters: Parameters,
        *,
        lr: float = 1.0,
        momentum: float = 0.0,
        compression: LQSGDState | None = None,
        process_group: Any = None,
    ):
        lr = finite_option("lr", lr, CompressionError)
        momentum = finite_option("momentum", momentum, CompressionError, zero=True, below=1)
        self.named = name_parameters(parameters)
        self.compression, self.exchanges = compression, 0
        self.group = process_group or dist.group.WORLD
        if compression is not None:
            self.group = compression.group
        self._common = {name: p.detach().clone() for name, p in self.named.items()}
        self.optimizer = torch.optim.SGD(
            self._common.values(), lr=lr, momentum=momentum, nesterov=momentum > 0
        )

    def begin(self, exchanges: int = 0) -> None:
        """Take the parameters as those that all processes have now. A collective.

        Args:
            exchanges: number of exchanges before, in a resumed run.

        Raises:
            CompressionError: on all processes, if their parameters differ.
        """
        found = gather_objects(self.group, digest(self.named))
        for rank, theirs in enumerate(found):
            if theirs != found[0]:
                raise CompressionError(
                    f"Local steps start from one model: rank {rank} has other parameters than "
                    "rank 0. Load the same weights on every rank."
                )
        self.exchanges = exchanges
        with torch.no_grad():
            for name, p in self.named.items():
                self._common[name].copy_(p)

    @torch.no_grad()
    def exchange(self) -> None:
        """Average the changes, and set the parameters to the new common ones. A collective.

        Raises:
            CompressionError: the exchange failed, or a change is not finite on any process.
        """
        changes = {name: self._common[name] - p for name, p in self.named.items()}
        if self.compression is not None:
            self.compression.mean_(changes)
        else:
            _average(list(changes.values()), self.group)
        if not all(bool(change.isfinite().all()) for change in changes.values()):
            raise CompressionError(
                f"A parameter is not finite in exchange {self.exchanges + 1}: a smaller learning "
                "rate may help."
            )
        for name, common in self._common.items():
            common.grad = changes[name]
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, p in self.named.items():
            p.copy_(self._common[name])
        self.exchanges += 1

    def stats(self) -> dict[str, Any]:
        """Bytes sent to other ranks, and those that a ring all-reduce sends; both in all exchanges.

        Keys: exchanges, bytes_sent, dense_bytes, workers. An all-reduce at every step sends
        `dense_bytes` times the steps between two exchanges.
        """
        workers = dist.get_world_size(self.group)
        copy = sum(p.element_size() * p.numel() for p in self.named.values())
        dense = self.exchanges * round(2 * (workers - 1) / workers * copy)
        sent = dense if self.compression is None else self.compression.stats()["bytes_sent"]
        return {
            "exchanges": self.exchanges,
            "bytes_sent": sent,
            "dense_bytes": dense,
            "workers": workers,
        }


def _average(tensors: list[Tensor], group: Any) -> None:
    """Replace the tensors by their means over the processes, with one all-reduce."""
    try:
        average_parameters(iter(tensors), group)  # type: ignore[reportArgumentType]
    except RuntimeError as error:
        raise CompressionError(
            f"Averaging the changes of the parameters failed; a worker may have died: {error}"
        ) from error
