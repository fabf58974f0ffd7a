"""Low-rank, log-quantised averaging of gradients with error feedback: one object per worker.

A matrix is sent as two factors; biases, norms, scalars and matrices too small to gain are sent
whole. Everything sent is quantised. What quantisation and low rank leave out stays in the
worker's residual, and is added to the gradient of the next step.
"""

import math
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hipp_ext.comm.averaging import Shards, choose_transport, mean_over_workers
from hipp_ext.comm.codec import LogCodec
from hipp_ext.comm.exchange import Exchange, Kind
from hipp_ext.comm.options import Options
from hipp_ext.errors import CompressionError


class Compressor:
    """One worker's part of compressed averaging.

    Args:
        shapes: shape of every gradient by name, in the same order on every worker.
        options: how gradients are compressed.
        workers, position: number of workers, and the number of this one, from 0.
        device: device of the residual: that of the gradients.

    Attributes:
        residual: name -> what was not sent yet, float32, flat or (rows, columns). It is made of
            this worker's data and as sensitive as its gradients.
        factors: name -> second factor of the last step, (rank, columns), the same on every worker.
            The next step starts from it.
        matrices: name -> (rows, columns, rank) of what is factored.
        vectors: name -> number of values of what is sent whole.
        stages: layout of the two messages: first factors with vectors, then second factors.
        message_bytes: bytes of one copy of the messages of a step.

    Source: LQ-SGD (arXiv 2506.17974): low-rank factors, log quantisation, error feedback.
        PowerSGD (arXiv 1905.13727), algorithm 1: power iteration with a warm start.
    Differs from the paper: its codes are all-reduced, but codes cannot be summed, so they are
        gathered (or exchanged in shards) and decoded. First factors are quantised, averaged and
        only then orthonormalised, because orthonormal factors of different workers have no useful
        mean. The residual is the worker's gradient minus its own contribution, not minus the mean,
        because the latter grows without bound if the workers' data differ. Vectors are quantised
        too. A conv kernel (out, in, h, w) is a matrix (out, in h w).
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
        self.options, self.workers, self.position = options, workers, position
        self.device = torch.device(device)
        sizes = {name: _as_matrix(shape, options) for name, shape in self.shapes.items()}
        self.matrices = {name: size for name, size in sizes.items() if size is not None}
        self.vectors = {n: math.prod(s) for n, s in self.shapes.items() if n not in self.matrices}
        self.residual = {name: self._zeros(name) for name in self.shapes}
        self._corrected = {name: self._zeros(name) for name in self.shapes}
        self.factors = {name: self._first_factor(name) for name in self.matrices}
        self.stages = self._layout(1)
        self.message_bytes = sum(stage.row_bytes for stage in self.stages)
        self.transport: Kind = choose_transport(options.transport, workers, self.message_bytes)
        if self.transport == "all_to_all" and workers > 1:
            self.stages = self._layout(workers)

    def step(self, gradients: Mapping[str, Tensor]) -> Exchange[dict[str, Tensor] | None]:
        """An exchange that averages `gradients` over the workers.

        Its result is name -> mean gradient, float32, bit-identical on all workers. It is None if
        a gradient or factor of any worker is not finite; then nothing has changed.

        A gradient of zeros leaves its residual where it is, because DDP ignores what is handed
        out for a parameter that no worker used.

        Raises:
            CompressionError: names or shapes differ from those the compressor was made for, or
                gradients are sparse or complex.
        """
        self._check(gradients)
        unused = self._add_residual(gradients)
        work = self._corrected
        first = [orthonormal(self.factors[n]) @ work[n].t() for n in self.matrices]
        averaged = yield from self._average(0, [*first, *(work[n] for n in self.vectors)])
        if averaged is None:
            return None
        lefts = [orthonormal(p) for p in averaged[0][: len(first)]]
        vector_means, vectors_sent = (tensors[len(first) :] for tensors in averaged)
        second = [p @ work[n] for n, p in zip(self.matrices, lefts, strict=True)]
        averaged = yield from self._average(1, second)
        if averaged is None:
            return None
        means = dict(zip(self.vectors, vector_means, strict=True))
        for name, sent in zip(self.vectors, vectors_sent, strict=True):
            work[name] -= sent
        for name, p, q, sent in zip(self.matrices, lefts, *averaged, strict=True):
            work[name].addmm_(p.t(), sent, alpha=-1)
            means[name] = p.t() @ q
            if q.any():  # a factor of zeros has no direction; the previous one is a better start
                self.factors[name] = q.clone()
        for name in unused:
            work[name] += self.residual[name]
        self.residual, self._corrected = work, self.residual
        return {name: means[name].view(shape) for name, shape in self.shapes.items()}

    def _average(
        self, stage: int, tensors: Sequence[Tensor]
    ) -> Exchange[tuple[list[Tensor], list[Tensor]] | None]:
        """(means, sent) of the tensors of one stage; None on all workers if any is not finite."""
        if not tensors:
            return [], []
        flat = torch.cat([t.flatten() for t in tensors])
        mean, sent = yield from mean_over_workers(
            flat, self.stages[stage], self.workers, self.position
        )
        if not bool(mean.isfinite().all()):
            return None
        sizes = [t.numel() for t in tensors]
        shaped = (
            [part.view_as(t) for part, t in zip(x.split(sizes), tensors, strict=True)]
            for x in (mean, sent)
        )
        means, sents = shaped
        return means, sents

    def _add_residual(self, gradients: Mapping[str, Tensor]) -> list[str]:
        """Fill the buffers with gradient + residual; returns the names whose gradient is zero."""
        unused = []
        for name, corrected in self._corrected.items():
            gradient = gradients[name].detach().reshape(corrected.shape)
            if gradient.amax() or gradient.amin():
                torch.add(self.residual[name], gradient, out=corrected)
            else:
                unused.append(name)
                corrected.zero_()
        return unused

    def _check(self, gradients: Mapping[str, Tensor]) -> None:
        refuse_unusable(gradients)
        given = {name: tuple(g.shape) for name, g in gradients.items() if g.numel()}
        if given != self.shapes:
            wrong = sorted(set(given.items()) ^ set(self.shapes.items()))[:4]
            raise CompressionError(
                "These gradients are not those the compressor was made for; they differ in "
                f"{wrong}."
            )

    def _layout(self, shards: int) -> tuple[Shards, Shards]:
        codec = LogCodec(bits=self.options.bits, alpha=self.options.alpha)
        lefts = [rows for rows, _, rank in self.matrices.values() for _ in range(rank)]
        rights = [columns for _, columns, rank in self.matrices.values() for _ in range(rank)]
        first = Shards([*lefts, *self.vectors.values()], codec, shards)
        return first, Shards(rights, codec, shards)

    def _zeros(self, name: str) -> Tensor:
        shape = self.matrices[name][:2] if name in self.matrices else (self.vectors[name],)
        return torch.zeros(shape, device=self.device)

    def _first_factor(self, name: str) -> Tensor:
        _, columns, rank = self.matrices[name]
        generator = torch.Generator().manual_seed(self.options.seed + zlib.crc32(name.encode()))
        return torch.randn(rank, columns, generator=generator).to(self.device)


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows (r, n) that span those of `rows` (r, n); zero rows give no NaN."""
    return torch.linalg.qr(rows.t()).Q.t().contiguous()


def refuse_unusable(gradients: Mapping[str, Tensor]) -> None:
    """Raise CompressionError for gradients that are sparse or not real floating-point numbers."""
    for name, gradient in gradients.items():
        if gradient.layout != torch.strided or not gradient.is_floating_point():
            raise CompressionError(
                f"The gradient of {name} is {gradient.layout}, {gradient.dtype}: dense real "
                "gradients are needed (of an embedding: sparse=False)."
            )


def _as_matrix(shape: tuple[int, ...], options: Options) -> tuple[int, int, int] | None:
    """(rows, columns, rank) of the factors, or None if the tensor is sent whole."""
    if len(shape) < 2:
        return None
    rows, columns = shape[0], math.prod(shape[1:])
    rank = min(options.rank, rows, columns)
    values = (rows + columns) * rank
    worth = values * options.min_compression_rate < rows * columns
    return (rows, columns, rank) if worth else None
