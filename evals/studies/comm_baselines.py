"""Ways to average gradients over simulated workers: LQ-SGD and what it is compared with. All in one process, bytes counted.

A real ring all-reduce sends 2 (w - 1) / w copies per worker, a gather w - 1 copies. That simulated LQ-SGD is bit-identical to
the hook under DDP is a test (tests/comm/processes.py).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hipp_ext.comm import Compressor, Options, run_together
from hipp_ext.comm.compressor import orthonormal

Gradients = Sequence[Mapping[str, Tensor]]
Averager = Callable[
    [Gradients], tuple[dict[str, Tensor], float]
]  # -> mean gradients, bytes sent by one worker
Shapes = Mapping[str, torch.Size]


def lqsgd(shapes: Shapes, workers: int, seed: int, **options: Any) -> Averager:
    """LQ-SGD as the library does it."""
    group = [
        Compressor(shapes, Options(seed=seed, **options), workers=workers, position=i)
        for i in range(workers)
    ]

    def average(gradients: Gradients) -> tuple[dict[str, Tensor], float]:
        means, sent = run_together([c.step(g) for c, g in zip(group, gradients, strict=True)])
        assert means[0] is not None
        return means[0], float(sent)

    return average


def dense(shapes: Shapes, workers: int, seed: int, dtype: torch.dtype = torch.float32) -> Averager:
    """All-reduce; half precision: as torch's fp16_compress_hook, divided before the sum."""
    sent = (
        _ring(workers)
        * sum(math.prod(s) for s in shapes.values())
        * torch.empty(0, dtype=dtype).element_size()
    )

    def average(gradients: Gradients) -> tuple[dict[str, Tensor], float]:
        total = {n: sum((g[n] / workers).to(dtype) for g in gradients) for n in shapes}
        return {n: torch.as_tensor(t).float() for n, t in total.items()}, sent

    return average


def powersgd(
    shapes: Shapes, workers: int, seed: int, rank: int = 1, dtype: torch.dtype = torch.float32
) -> Averager:
    """PowerSGD as torch's hook does it (memory: input less averaged output; warm start), from the first step on.

    dtype float16: as under torch's fp16_compress_wrapper, which hands the hook half-precision gradients.
    """
    matrices = Compressor(shapes, Options(rank=rank)).matrices
    generator = torch.Generator().manual_seed(seed)
    factors = {
        n: torch.randn(r, m, generator=generator).to(dtype) for n, (_, m, r) in matrices.items()
    }
    errors = [
        {n: torch.zeros(rows, columns, dtype=dtype) for n, (rows, columns, _) in matrices.items()}
        for _ in range(workers)
    ]
    values = sum((n + m) * r for n, m, r in matrices.values()) + sum(
        math.prod(s) for k, s in shapes.items() if k not in matrices
    )
    sent = _ring(workers) * values * torch.empty(0, dtype=dtype).element_size()

    def average(gradients: Gradients) -> tuple[dict[str, Tensor], float]:
        means = {}
        for name, shape in shapes.items():
            if name not in matrices:
                means[name] = torch.as_tensor(
                    sum((g[name] / workers).to(dtype) for g in gradients)
                ).float()
                continue
            inputs = [
                g[name].reshape(e[name].shape).to(dtype) + e[name]
                for g, e in zip(gradients, errors, strict=True)
            ]
            base = orthonormal(factors[name].float()).to(dtype)
            left = orthonormal(torch.as_tensor(sum(base @ m.t() for m in inputs)).float()).to(dtype)
            factors[name] = torch.as_tensor(sum(left @ m for m in inputs)) / workers
            output = left.t() @ factors[name]
            for e, m in zip(errors, inputs, strict=True):
                e[name] = m - output
            means[name] = output.float().view(shape)
        return means, sent

    return average


def qsgd(shapes: Shapes, workers: int, seed: int, levels: int = 127) -> Averager:
    """QSGD-like: every value rounded at random, without bias, to one of 2 x 127 levels of its tensor's largest; gathered.

    Source: QSGD (arXiv 1610.02132), with the largest value as the norm.
    """
    generator = torch.Generator().manual_seed(seed)
    sent = (workers - 1) * float(sum(math.prod(s) + 4 for s in shapes.values()))

    def through(x: Tensor) -> Tensor:
        scale = x.abs().max().clamp_min(1e-30)
        return (
            (x / scale * levels + torch.rand(x.shape, generator=generator)).floor() / levels * scale
        )

    return lambda gradients: (
        {n: torch.stack([through(g[n]) for g in gradients]).mean(0) for n in shapes},
        sent,
    )


def top_k(shapes: Shapes, workers: int, seed: int, payload: int) -> Averager:
    """The largest values of the whole gradient and their places (4 + 4 bytes), `payload` bytes a worker; error feedback."""
    sizes = [math.prod(s) for s in shapes.values()]
    errors = [torch.zeros(sum(sizes)) for _ in range(workers)]
    k = max(1, payload // 8)

    def average(gradients: Gradients) -> tuple[dict[str, Tensor], float]:
        total = torch.zeros(sum(sizes))
        for error, g in zip(errors, gradients, strict=True):
            error += torch.cat([g[n].flatten() for n in shapes])
            places = error.abs().topk(k).indices
            total[places] += error[places] / workers
            error[places] = 0.0
        return {
            n: t.view(s) for (n, s), t in zip(shapes.items(), total.split(sizes), strict=True)
        }, (workers - 1) * 8.0 * k

    return average


def methods(shapes: Shapes, workers: int, rank: int) -> dict[str, Callable[[int], Averager]]:
    """Name -> how to make it for a seed; top-k gets as many bytes as LQ-SGD at 8 bits."""
    payload = Compressor(shapes, Options(rank=rank), workers=workers).message_bytes
    return {
        "fp32": lambda seed: dense(shapes, workers, seed),
        "fp16": lambda seed: dense(shapes, workers, seed, torch.float16),
        "PowerSGD": lambda seed: powersgd(shapes, workers, seed, rank),
        "PowerSGD fp16": lambda seed: powersgd(shapes, workers, seed, rank, torch.float16),
        "LQ-SGD 8 bits": lambda seed: lqsgd(shapes, workers, seed, rank=rank, bits=8),
        "LQ-SGD 4 bits": lambda seed: lqsgd(shapes, workers, seed, rank=rank, bits=4),
        "QSGD 8 bits": lambda seed: qsgd(shapes, workers, seed),
        "top-k": lambda seed: top_k(shapes, workers, seed, payload),
    }


def _ring(workers: int) -> float:
    return 2 * (workers - 1) / workers
