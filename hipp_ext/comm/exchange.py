"""Exchanges of bytes between workers, apart from what carries the bytes.

An exchange is a generator that yields a `Packet` of bytes and receives the bytes of all workers.
`run_in_group` carries them over a process group, `run_together` within one process.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hipp_ext.errors import CompressionError

Kind = Literal["all_gather", "all_to_all"]
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Packet:
    """Bytes to exchange.

    Attributes:
        kind: "all_gather": the single row goes to every worker, and every worker's row returns.
            "all_to_all": row j goes to worker j, and each worker's row for this one returns.
        rows: uint8, (1, bytes) or (workers, bytes); the same shape on every worker.
    """

    kind: Kind
    rows: Tensor

    def bytes_sent(self, workers: int) -> int:
        """Bytes that one worker sends to the others."""
        return self.rows.shape[1] * (workers - 1)


Exchange = Generator[Packet, Tensor, Result]


def run_in_group(exchange: Exchange[Result], group: Any) -> tuple[Result, int]:
    """Run `exchange` over a process group; every member runs its own.

    Returns:
        The result of the exchange, and the bytes that this worker sent to the others.

    Raises:
        CompressionError: a collective failed, for example because a worker died. It fails within
            the timeout of the group.
    """
    workers = dist.get_world_size(group)
    # torch 2.13 renamed it.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    reply: Any = None
    sent = 0
    while True:
        try:
            packet = exchange.send(reply)
        except StopIteration as finished:
            return finished.value, sent
        reply = packet.rows.new_empty(workers, packet.rows.shape[1])
        collective = gather if packet.kind == "all_gather" else dist.all_to_all_single
        try:
            collective(reply.view(-1), packet.rows.reshape(-1), group=group)
        except RuntimeError as error:
            raise CompressionError(
                f"Exchanging compressed gradients failed ({packet.kind}, {packet.rows.numel()} "
                f"bytes, {workers} workers); a worker may have died or be in another step: {error}"
            ) from error
        sent += packet.bytes_sent(workers)


def run_together(exchanges: Sequence[Exchange[Result]]) -> tuple[list[Result], int]:
    """Run the exchanges of simulated workers in this process, as `run_in_group` does for real ones.

    Returns:
        The result of each exchange, and the bytes that each worker sent to the others.

    Raises:
        CompressionError: the packets of the workers do not fit together.
    """
    replies: list[Any] = [None] * len(exchanges)
    results: list[Any] = []
    sent = 0
    while True:
        packets: list[Packet] = []
        for exchange, reply in zip(exchanges, replies, strict=True):
            try:
                packets.append(exchange.send(reply))
            except StopIteration as finished:
                results.append(finished.value)
        if results and not packets:
            return results, sent
        if results or len({(p.kind, p.rows.shape) for p in packets}) > 1:
            found = [(p.kind, tuple(p.rows.shape)) for p in packets]
            raise CompressionError(f"The workers are in different steps: {found}.")
        sent += packets[0].bytes_sent(len(packets))
        rows = torch.stack([p.rows for p in packets])
        same = packets[0].kind == "all_gather"
        replies = [rows[:, 0] if same else rows[:, j] for j in range(len(packets))]
