"""The mean of quantised values over workers.

Codes cannot be summed on the way, so the packed bytes travel and every worker decodes them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from hipp_ext.comm.codec import ALIGNMENT, Blocks, LogCodec
from hipp_ext.comm.exchange import Exchange, Kind, Packet
from hipp_ext.errors import CompressionError

TRANSPORTS = ("auto", "all_gather", "all_to_all")
MIN_SAVED_BYTES = 40_000  # per step; all_to_all has two more rounds, which must save at least this


class Shards:
    """How a flat vector of blocks is quantised: in equal shards, each with its own blocks.

    Args:
        lengths: lengths of the blocks, in order. A block that crosses a border is divided there.
        codec: codec of all values.
        count: number of shards; 1 for all_gather, the number of workers for all_to_all.
    """

    def __init__(self, lengths: Sequence[int], codec: LogCodec, count: int):
        self.codec, self.count, self.size = codec, count, sum(lengths)
        self.row = -(-self.size // count)
        self.row += -self.row % ALIGNMENT
        parts = _divide([*lengths, self.row * count - self.size], self.row)
        n_scales = max(map(len, parts), default=0)
        self.blocks = tuple(Blocks(lengths=part, n_scales=n_scales) for part in parts)

    @property
    def row_bytes(self) -> int:
        """Bytes of the message of one shard."""
        return self.codec.message_bytes(self.blocks[0]) if self.blocks else 0

    def encode(self, values: Tensor) -> Tensor:
        """Messages (count, row_bytes) uint8 of the flat float32 `values`."""
        padded = functional.pad(values, (0, self.row * self.count - self.size))
        rows = padded.view(self.count, 1, self.row)
        encode = self.codec.encode
        return torch.cat([encode(r, b) for r, b in zip(rows, self.blocks, strict=True)])

    def decode(self, messages: Tensor) -> Tensor:
        """Values (count, row) float32 of `messages` (count, row_bytes), padding included."""
        decode = self.codec.decode
        rows = zip(messages[:, None], self.blocks, strict=True)
        return torch.cat([decode(message, blocks) for message, blocks in rows])


def mean_over_workers(
    values: Tensor, shards: Shards, workers: int, position: int
) -> Exchange[tuple[Tensor, Tensor]]:
    """The mean of the values over the workers, and what this worker contributed to it.

    With several shards, each worker decodes and averages one shard of all workers' values, and
    quantises the average again for all. The error of this second quantisation counts as a part
    of its own contribution. So the contributions of all workers sum to `workers` times the mean.

    Args:
        values: flat float32 values, not empty.
        shards: how they are quantised; the same on every worker.
        workers, position: number of workers, and the number of this one.

    Returns:
        (mean, sent), both flat float32; `mean` is bit-identical on all workers.

    Source: DeepSpeed's compressed all-reduce (1-bit Adam, arXiv 2102.02888) for several shards.
    Differs from it: there is no second residual; the owner of the shard uses its own.
    """
    message = shards.encode(values)
    sent = shards.decode(message)
    if shards.count == 1:
        received = yield Packet(kind="all_gather", rows=message)
        mean = shards.codec.decode(received, shards.blocks[0]).mean(0)
    else:
        received = yield Packet(kind="all_to_all", rows=message)
        own = shards.blocks[position]
        average = shards.codec.decode(received, own).mean(0, keepdim=True)
        message = shards.codec.encode(average, own)
        sent[position] -= workers * (average - shards.codec.decode(message, own))[0]
        received = yield Packet(kind="all_gather", rows=message)
        mean = shards.decode(received).flatten()
    return mean[: shards.size], sent.flatten()[: shards.size]


def choose_transport(asked: str, workers: int, message_bytes: int) -> Kind:
    """The transport that was asked for; for "auto", the one that is expected to be faster.

    This is all_gather for two workers and for small messages, and all_to_all otherwise.

    Args:
        asked: "auto", "all_gather" or "all_to_all".
        workers: number of workers.
        message_bytes: bytes of one worker's messages in a step. all_gather sends them
            workers - 1 times in two rounds, all_to_all 2 (workers - 1) / workers times in four.

    Raises:
        CompressionError: `asked` is none of these.
    """
    if not isinstance(asked, str) or asked not in TRANSPORTS:
        raise CompressionError(f"transport={asked!r}: one of {', '.join(TRANSPORTS)} is needed.")
    if asked == "all_gather" or asked == "all_to_all":
        return asked
    saved = message_bytes * (workers - 1) * (1 - 2 / workers)
    return "all_to_all" if saved > MIN_SAVED_BYTES else "all_gather"


def _divide(lengths: Sequence[int], row: int) -> list[tuple[int, ...]]:
    """The lengths of the blocks in each row of `row` values."""
    rows: list[list[int]] = []
    room = 0
    for length in lengths:
        while length:
            if not room:
                rows.append([])
                room = row
            part = min(length, room)
            rows[-1].append(part)
            length, room = length - part, room - part
    return [tuple(r) for r in rows]
