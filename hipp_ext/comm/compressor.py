"""Low-rank, log-quantised averaging of gradients with error feedback: pure tensor code, one object per worker.

A matrix goes as two factors, everything else (biases, norms, scalars, matrices too small to gain) as it is; all of it
quantised, and all that quantisation and low rank leave out waits in the worker's memory for the next step.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hipp_ext.comm.codec import LogCodec
from hipp_ext.comm.exact import positive_number, whole_number
from hipp_ext.comm.transports import Exchange, Kind, Section, choose_transport, mean_over_workers
from hipp_ext.errors import CompressionError


@dataclass(frozen=True, kw_only=True)
class Options:
    """How gradients are compressed; the same on every worker.

    Attributes:
        rank: of the factors, at most.
        bits: per value of the factors, 1 to 8.
        vector_bits: per value of what goes whole; None: as `bits`.
        alpha: of the codec; see `LogCodec`.
        transport: "auto", "all_gather" or "all_to_all"; see `choose_transport`.
        min_rate: a matrix goes as factors only where that takes this many times fewer values than going whole.
        seed: of the first factors.

    Raises:
        CompressionError: an option is out of range, or is no exact number where one is needed. Numbers of numpy and torch, and
            floats such as 8.0, are taken as what they are; True and "4" are not.
    """

    rank: int = 4
    bits: int = 8
    vector_bits: int | None = None
    alpha: float = 5.0
    transport: str = "auto"
    min_rate: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "rank": whole_number("rank", self.rank, 1),
            "bits": whole_number("bits", self.bits, 1, 8),
            "alpha": positive_number("alpha", self.alpha),
            "transport": str(self.transport),
            "min_rate": positive_number("min_rate", self.min_rate),
            "seed": whole_number("seed", self.seed, -(2**63), 2**63),  # what torch.Generator takes
        }
        if self.vector_bits is not None:
            checked["vector_bits"] = whole_number("vector_bits", self.vector_bits, 1, 8)
        choose_transport(self.transport, 1, 0)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def plain(self) -> dict[str, int | float | str | None]:
        """As plain types, for files and comparisons."""
        return asdict(self)


class Compressor:
    """One worker's share of compressed averaging.

    Args:
        shapes: name -> shape of every gradient, in the same order on every worker.
        options: how.
        workers, position: how many workers there are, and which of them this is, from 0.
        device: where the memory lies: the gradients' device.

    Attributes:
        memory: name -> what was not sent yet, float32, flat or (rows, columns). It is made of this worker's data: as sensitive
            as its gradients.
        factors: name -> second factor of the last step, (rank, columns), the same on every worker; where the next one starts.

    Source: LQ-SGD (arXiv 2506.17974): low-rank factors, log quantisation, error feedback. PowerSGD (arXiv 1905.13727),
        algorithm 1: power iteration with a warm start.
    Differs from the paper: its workers' codes would be all-reduced, but codes cannot be summed, so they are gathered (or
        exchanged in shards) and decoded. First factors are quantised, averaged and only then made orthonormal, since
        orthonormal factors of different workers have no useful mean. A worker remembers its own gradient less its own
        contribution, not less the mean, because the latter grows without bound where workers' data differ. Vectors are
        quantised too. Conv kernels (out, in, h, w) are matrices (out, in h w).
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        options: Options,
        *,
        workers: int = 1,
        position: int = 0,
        device: str | torch.device = "cpu",
    ):
        self.shapes = {name: tuple(shape) for name, shape in shapes.items() if math.prod(shape)}
        self.options, self.workers, self.position, self.device = (
            options,
            workers,
            position,
            torch.device(device),
        )
        self.matrices = {
            n: m
            for n, shape in self.shapes.items()
            if (m := _as_matrix(shape, options)) is not None
        }
        self.vectors = {n: math.prod(s) for n, s in self.shapes.items() if n not in self.matrices}
        self.memory = {name: self._zeros(name) for name in self.shapes}
        self._spare = {name: self._zeros(name) for name in self.shapes}
        self.factors = {n: self._first_factor(n) for n in self.matrices}
        sections = self._sections(1)
        self.message_bytes = sum(section.row_bytes for stage in sections for section in stage)
        self.transport: Kind = choose_transport(options.transport, workers, self.message_bytes)
        self._stages = (
            sections if self.transport == "all_gather" or workers == 1 else self._sections(workers)
        )

    def step(self, gradients: Mapping[str, Tensor]) -> Exchange[dict[str, Tensor] | None]:
        """An exchange whose result is name -> mean gradient over the workers, float32, the same on all of them to the bit.

        A gradient that is zero throughout leaves its memory where it is: DDP drops what is handed out for a parameter that no
        worker used.

        Returns:
            The means; None where any worker's gradients (or their factors) were not finite: nothing is changed then.

        Raises:
            CompressionError: names or shapes are not those this compressor was made for, or gradients are sparse or complex.
        """
        self._check(gradients)
        idle = self._add_memory(gradients)
        work = self._spare
        bases = {n: orthonormal(q) for n, q in self.factors.items()}
        first = [bases[n] @ work[n].t() for n in self.matrices]
        vectors = _flat([work[n] for n in self.vectors], self.device)
        stage = yield from self._average(0, [_flat(first, self.device), vectors])
        if stage is None:
            return None
        (left, _), (vector_means, vectors_sent) = stage
        lefts = {
            n: orthonormal(p) for n, p in zip(self.matrices, _split_like(left, first), strict=True)
        }
        second = [p @ work[n] for n, p in lefts.items()]
        stage = yield from self._average(1, [_flat(second, self.device)])
        if stage is None:
            return None
        ((right, right_sent),) = stage
        means = dict(
            zip(self.vectors, vector_means.split(list(self.vectors.values())), strict=True)
        )
        for n, sent in zip(
            self.vectors, vectors_sent.split(list(self.vectors.values())), strict=True
        ):
            work[n] -= sent
        for (n, p), q, sent in zip(
            lefts.items(), _split_like(right, second), _split_like(right_sent, second), strict=True
        ):
            work[n].addmm_(p.t(), sent, alpha=-1)
            means[n] = p.t() @ q
            if q.any():  # an all-zero factor points nowhere: the last one is the better start
                self.factors[n] = q.clone()
        for n in idle:
            work[n] += self.memory[n]
        self.memory, self._spare = work, self.memory
        return {n: means[n].view(shape) for n, shape in self.shapes.items()}

    def _average(
        self, stage: int, values: list[Tensor]
    ) -> Exchange[list[tuple[Tensor, Tensor]] | None]:
        """Means and own shares of one stage; None where something is not finite, which all workers see alike."""
        filled = [i for i, v in enumerate(values) if v.numel()]
        result = [(v, v) for v in values]
        if filled:
            sections = [self._stages[stage][i] for i in filled]
            averaged = yield from mean_over_workers(
                [values[i] for i in filled], sections, self.workers, self.position
            )
            if not all(bool(mean.isfinite().all()) for mean, _ in averaged):
                return None
            for i, pair in zip(filled, averaged, strict=True):
                result[i] = pair
        return result

    def _add_memory(self, gradients: Mapping[str, Tensor]) -> list[str]:
        """Fill the spare buffers with gradient + memory; returns the names whose gradient is zero."""
        idle = []
        for name, spare in self._spare.items():
            gradient = gradients[name].detach().reshape(spare.shape)
            if not (gradient.amax() or gradient.amin()):
                idle.append(name)
                spare.zero_()
            else:
                torch.add(self.memory[name], gradient, out=spare)
        return idle

    def _check(self, gradients: Mapping[str, Tensor]) -> None:
        refuse_unusable(gradients)
        given = {name: tuple(g.shape) for name, g in gradients.items() if g.numel()}
        if given != self.shapes:
            wrong = sorted(set(given.items()) ^ set(self.shapes.items()))[:4]
            raise CompressionError(
                f"These gradients are not those the compressor was made for; they differ in {wrong}."
            )

    def _sections(self, shards: int) -> tuple[list[Section], list[Section]]:
        o = self.options
        factor, vector = (
            LogCodec(bits=o.bits, alpha=o.alpha),
            LogCodec(bits=o.vector_bits or o.bits, alpha=o.alpha),
        )
        columns: Iterator[tuple[int, int, int]] = iter(self.matrices.values())
        rows, cols, ranks = zip(*columns, strict=True) if self.matrices else ((), (), ())
        lefts = [n for n, r in zip(rows, ranks, strict=True) for _ in range(r)]
        rights = [m for m, r in zip(cols, ranks, strict=True) for _ in range(r)]
        first = [
            Section(lefts, factor, shards),
            Section(list(self.vectors.values()), vector, shards),
        ]
        return first, [Section(rights, factor, shards)]

    def _zeros(self, name: str) -> Tensor:
        shape = self.matrices[name][:2] if name in self.matrices else (self.vectors[name],)
        return torch.zeros(shape, device=self.device)

    def _first_factor(self, name: str) -> Tensor:
        _, columns, rank = self.matrices[name]
        generator = torch.Generator().manual_seed(self.options.seed + zlib.crc32(name.encode()))
        return torch.randn(rank, columns, generator=generator).to(self.device)


def orthonormal(rows: Tensor) -> Tensor:
    """An orthonormal basis of the span of `rows` (r, n), completed where they are dependent; zero input gives no NaN."""
    return torch.linalg.qr(rows.t()).Q.t().contiguous()


def refuse_unusable(gradients: Mapping[str, Tensor]) -> None:
    """Raise CompressionError for gradients that are sparse or not real floating-point numbers."""
    for name, gradient in gradients.items():
        if gradient.layout != torch.strided or not gradient.is_floating_point():
            raise CompressionError(
                f"The gradient of {name} is {gradient.layout}, {gradient.dtype}: dense real gradients are needed (of an "
                "embedding: sparse=False)."
            )


def _as_matrix(shape: tuple[int, ...], options: Options) -> tuple[int, int, int] | None:
    """(rows, columns, rank) of the factors, or None where the tensor goes whole."""
    if len(shape) < 2:
        return None
    rows, columns = shape[0], math.prod(shape[1:])
    rank = min(options.rank, rows, columns)
    return (
        (rows, columns, rank)
        if (rows + columns) * rank * options.min_rate < rows * columns
        else None
    )


def _flat(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat([t.flatten() for t in tensors]) if tensors else torch.zeros(0, device=device)


def _split_like(values: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    parts = values.split([t.numel() for t in tensors]) if tensors else ()
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]
