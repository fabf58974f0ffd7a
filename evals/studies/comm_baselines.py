"""Ways to average gradients over simulated workers in one process: LQ-SGD and its alternatives.

Bytes are counted as on a network: a ring all-reduce sends 2 (w - 1) / w copies per worker, a gather
w - 1 copies. A test shows that simulated LQ-SGD equals the hook under DDP to the bit
(tests/comm/processes.py).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hipp_ext.comm import Compressor, Options, run_together
from hipp_ext.comm.compressor import orthonormal

Gradients = Sequence[Mapping[str, Tensor]]
# Gradients of all workers -> mean gradients, bytes sent by one worker.
Averager = Callable[[Gradients], tuple[dict[str, Tensor], float]]
Shapes = Mapping[str, torch.Size]


def lqsgd(shapes: Shapes, workers: int, seed: int, **options: Any) -> Averager:
    """LQ-SGD, by the library's compressor."""
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
    """All-reduce; with float16 as in torch's fp16_compress_hook: gradients are divided first."""
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
    """PowerSGD as in torch's hook, from the first step on: error feedback and warm start.

    With dtype float16 it acts as under torch's fp16_compress_wrapper, which gives the hook
    half-precision gradients.
    """
    matrices = Compressor(shapes, Options(rank=rank)).matrices
    generator = torch.Generator().manual_seed(seed)
    factors = {
        n: torch.randn(r, m, generator=generator).to(dtype) for n, (_, m, r) in matrices.items()
    }
    errors = [
        {n: torch.zeros(*size[:2], dtype=dtype) for n, size in matrices.items()}
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
    """QSGD: unbiased random rounding to 2 x 127 levels of the tensor's largest value; gathered.

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
    """Top-k with error feedback: values and indices (4 + 4 bytes), `payload` bytes per worker."""
    sizes = [math.prod(s) for s in shapes.values()]
    errors = [torch.zeros(sum(sizes)) for _ in range(workers)]
    k = max(1, payload // 8)

    def average(gradients: Gradients) -> tuple[dict[str, Tensor], float]:
        total = torch.zeros(sum(sizes))
        for error, g in zip(errors, gradients, strict=True):
            error += torch.cat([g[n].flatten() for n in shapes])
            indices = error.abs().topk(k).indices
            total[indices] += error[indices] / workers
            error[indices] = 0.0
        return {
            n: t.view(s) for (n, s), t in zip(shapes.items(), total.split(sizes), strict=True)
        }, (workers - 1) * 8.0 * k

    return average


def methods(shapes: Shapes, workers: int, rank: int) -> dict[str, Callable[[int], Averager]]:
    """Name -> its averager, given a seed; top-k sends as many bytes as LQ-SGD at 8 bits."""
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


def gradients_of(
    model: nn.Module, images: Tensor, labels: Tensor, *, graph: bool = False
) -> dict[str, Tensor]:
    """Gradients of the cross-entropy by name; with `graph` they can be differentiated again."""
    named = dict(model.named_parameters())
    loss = functional.cross_entropy(model(images), labels)
    found = torch.autograd.grad(loss, list(named.values()), create_graph=graph)
    return dict(zip(named, found, strict=True))


def _ring(workers: int) -> float:
    return 2 * (workers - 1) / workers
