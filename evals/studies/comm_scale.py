"""`hipp bench codec` and `hipp bench scale`: the codec's speed, and what a step costs on machines that are not at hand.

The simulation is arithmetic on measured speeds of this machine (matmul, QR, codec, one thread) and a model of the network: a
message of N bytes takes rounds x latency + bytes sent / bandwidth. Ring all-reduce of N bytes: 2 (w - 1) rounds and
2 (w - 1) / w N bytes; all_gather: w - 1 rounds, (w - 1) N bytes; all_to_all with requantisation: as the ring. Left out are
overlap with the backward pass, which would help the dense all-reduce, and contention.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from hipp_ext.comm import Blocks, Compressor, LogCodec, Options
from hipp_ext.comm.compressor import orthonormal
from hipp_ext.evals.studies.measuring import keep_picture, ratio, report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORKERS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LATENCY = 100e-6  # s per round
RANK = 32
MODELS = {  # name -> (layers, width, ffn width, vocabulary), Llama-like
    "125M": (12, 768, 2048, 32_000),
    "1.3B": (24, 2048, 5504, 32_000),
    "7B": (32, 4096, 11008, 32_000),
}
OURS = "LQ-SGD 8 bits"
METHODS = ("fp32", "fp16", "PowerSGD", "PowerSGD fp16", OURS, "LQ-SGD 4 bits")


def run_codec(repeats: int = 50, save: bool = False) -> dict[str, Any]:
    """Encode and decode a million values; three passes of torch's fp16 cast over the same data beside it.

    A pass is x.half(); "there and back" is x.half().float(), which is what a gradient goes through. CPU time, one thread.
    """
    torch.set_num_threads(1)
    x = torch.randn(1, 1 << 20)
    blocks = Blocks(lengths=(2048,) * 512, n_scales=512)
    sides: dict[str, Any] = {
        "three fp16 casts": lambda: [x.half() for _ in range(3)],
        "three fp16 casts there and back": lambda: [x.half().float() for _ in range(3)],
    }
    for bits in (8, 4):
        codec = LogCodec(bits=bits)
        sides[f"{bits} bits"] = lambda codec=codec: codec.decode(codec.encode(x, blocks), blocks)
    for name, call in _compiled(x).items():
        sides[name] = call
    times = _cpu_times(sides, repeats)
    values = {
        "values": x.numel(),
        "seconds": {name: sorted(t)[len(t) // 2] for name, t in times.items()},
        "times slower": {
            f"{name} / {cast}": ratio(times, name, cast)
            for name in sides
            if "cast" not in name
            for cast in list(sides)[:2]
        },
    }
    return report("codec", f"hipp bench codec --repeats {repeats}", values, save)


def _cpu_times(
    sides: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Side -> CPU seconds of this process, the sides taking turns; what else the machine does is not counted."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + repeats):
        for name, call in sides.items():
            start = time.process_time()
            call()
            if number >= warmup:
                times[name].append(time.process_time() - start)
    return times


def _compiled(x: torch.Tensor) -> dict[str, Any]:
    """The same codes with arithmetic in place of tables, fused by torch.compile; empty where there is no compiler."""
    levels, alpha = 127, 5.0
    steps = levels / math.log2(1 + alpha)

    def encode(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = torch.maximum(rows.amax(1), -rows.amin(1))
        bits = (rows.abs() * torch.where(scale > 0, alpha / scale, 0.0)[:, None] + 1).view(
            torch.int32
        )
        m = ((bits & 0x7FFFFF) | 0x3F800000).view(
            torch.float32
        ) - 1  # log2 by exponent and a polynomial of the mantissa
        log = ((bits >> 23) - 127).float() + m * (
            1.43610 + m * (-0.66952 + m * (0.31221 + m * -0.07915))
        )
        code = (log * steps + 0.5).to(torch.int32)
        return torch.where(rows < 0, 128 - code, 128 + code).to(torch.uint8), scale

    def decode(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        level = codes.to(torch.int32) - 128
        z = level.abs().float() / steps
        whole = z.to(torch.int32)
        f = z - whole.float()
        power = ((whole + 127) << 23).view(torch.float32) * (
            1 + f * (0.6951 + f * (0.2276 + f * 0.0773))
        )
        value = (power - 1) * (scale / alpha)[:, None]
        return torch.where(level < 0, -value, value)

    try:
        fast_encode, fast_decode = torch.compile(encode), torch.compile(decode)
        rows = x.view(512, 2048)
        fast_decode(*fast_encode(rows))
    except Exception as error:  # whatever a compiler that is not there, or is broken, raises
        print(f"torch.compile does not work here, so the fused codec is left out: {error!r:.100}")
        return {}
    return {"8 bits, compiled": lambda: fast_decode(*fast_encode(rows))}


def run_scale(save: bool = False) -> dict[str, Any]:
    """Cost per step against workers, bandwidths where LQ-SGD stops paying; a plot with `save`. Seconds, Gbit/s."""
    torch.set_num_threads(1)
    speeds = measure_speeds()
    table: dict[str, Any] = {}
    for model in MODELS:
        shapes = model_shapes(*MODELS[model])
        counts = factor_counts(shapes)
        rows = {
            f"{gbit:g} Gbit/s": {
                m: {w: step_cost(m, counts, w, gbit, speeds) for w in WORKERS} for m in METHODS
            }
            for gbit in (0.1, 1.0, 10.0)
        }
        crossover = {w: _crossover(counts, w, speeds) for w in WORKERS}
        table[model] = {**counts, "seconds": rows, "LQ-SGD 8 bits beats below [Gbit/s]": crossover}
        print(f"{model}: {counts}; at 8 workers 8 bits beat {_said(crossover[8])}")
    if save:
        keep_picture("scale", _picture(table), save=True)
    values = {"rank": RANK, "latency": LATENCY, "measured speeds": speeds, "models": table}
    return report("scale", "hipp bench scale", values, save)


def measure_speeds() -> dict[str, float]:
    """This machine, one thread: multiply-adds per second of tall factors, QR and codec values per second."""
    matrix, factor, x = torch.randn(1024, 1024), torch.randn(RANK, 1024), torch.randn(1, 1 << 20)
    blocks = Blocks(lengths=(2048,) * 512, n_scales=512)
    speeds = {}
    calls: dict[str, tuple[Any, int]] = {
        "matmul": (lambda: factor @ matrix, RANK * 1024 * 1024),
        "QR": (lambda: orthonormal(factor), RANK * 1024),
    }
    for bits in (8, 4):
        codec = LogCodec(bits=bits)
        message = codec.encode(x, blocks)
        calls[f"encode {bits}"] = (lambda codec=codec: codec.encode(x, blocks), x.numel())
        calls[f"decode {bits}"] = (
            lambda codec=codec, message=message: codec.decode(message, blocks),
            x.numel(),
        )
    for name, times in _cpu_times({n: c for n, (c, _) in calls.items()}, 20).items():
        speeds[name] = calls[name][1] / sorted(times)[len(times) // 2]
    return speeds


def model_shapes(layers: int, width: int, ffn: int, words: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a Llama-like model's parameters."""
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (words, width),
        "head": (words, width),
        "norm": (width,),
    }
    for i in range(layers):
        shapes |= {f"{i}.{n}": (width, width) for n in "qkvo"} | {
            f"{i}.{n}": (width,) for n in ("norm1", "norm2")
        }
        shapes |= {f"{i}.gate": (ffn, width), f"{i}.up": (ffn, width), f"{i}.down": (width, ffn)}
    return shapes


def factor_counts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Parameters; values of the first factors with the vectors, and of the second; multiply-adds of one power iteration."""
    probe = Compressor({n: s for n, s in shapes.items() if len(s) == 1}, Options(rank=RANK))
    rows = [s for s in shapes.values() if len(s) == 2]
    return {
        "parameters": sum(math.prod(s) for s in shapes.values()),
        "first": sum(RANK * n for n, _ in rows) + sum(probe.vectors.values()),
        "second": sum(RANK * m for _, m in rows),
        "multiply-adds": sum(3 * RANK * n * m for n, m in rows),  # both factors, and their product
    }


def step_cost(
    method: str, counts: Mapping[str, int], workers: int, gbit: float, speeds: Mapping[str, float]
) -> float:
    """Seconds of averaging, by the model in this file's docstring; the cheaper transport for LQ-SGD."""
    byte = 8 / (gbit * 1e9)
    copies, ring_rounds = 2 * (workers - 1) / workers, 2 * (workers - 1)
    if method in ("fp32", "fp16"):
        return (
            ring_rounds * LATENCY
            + copies * counts["parameters"] * (4 if method == "fp32" else 2) * byte
        )
    values = counts["first"] + counts["second"]
    compute = counts["multiply-adds"] / speeds["matmul"] + values / speeds["QR"]
    if method.startswith("PowerSGD"):
        return (
            compute
            + 2 * ring_rounds * LATENCY
            + copies * values * (2 if "fp16" in method else 4) * byte
        )
    bits = 8 if "8" in method else 4
    size = values * bits / 8
    encode, decode = values / speeds[f"encode {bits}"], values / speeds[f"decode {bits}"]
    gather = (
        encode + (workers + 1) * decode + 2 * (workers - 1) * LATENCY + (workers - 1) * size * byte
    )
    # Each encodes all, decodes its own for its memory, decodes its shard of everyone's, encodes it, decodes all shards.
    exchange = (
        encode * (1 + 1 / workers) + 3 * decode + 2 * ring_rounds * LATENCY + copies * size * byte
    )
    return compute + min(gather, exchange)


def _crossover(
    counts: Mapping[str, int], workers: int, speeds: Mapping[str, float]
) -> dict[str, float | None]:
    """Other method -> bandwidth [Gbit/s] below which LQ-SGD with 8 bits is cheaper; None: at none."""
    grid = [10 ** (k / 20) for k in range(-60, 81)]  # 1 Mbit/s to 10 Tbit/s
    found: dict[str, float | None] = {}
    for other in ("fp32", "fp16", "PowerSGD", "PowerSGD fp16"):
        gains = {
            g: step_cost(other, counts, workers, g, speeds)
            - step_cost(OURS, counts, workers, g, speeds)
            for g in grid
        }
        found[other] = max((g for g, gain in gains.items() if gain > 0), default=None)
    return found


def _said(crossover: Mapping[str, float | None]) -> str:
    return ", ".join(
        f"{name} below {value:.3g} Gbit/s" if value else f"{name} nowhere"
        for name, value in crossover.items()
    )


def _picture(table: Mapping[str, Any]) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(4.2 * len(MODELS), 7), layout="constrained")
    axes = figure.subplots(2, len(MODELS), squeeze=False)
    for column, (model, row) in enumerate(table.items()):
        for method in METHODS:
            axes[0][column].loglog(
                WORKERS, list(row["seconds"]["1 Gbit/s"][method].values()), label=method
            )
        axes[0][column].set(title=f"{model}, 1 Gbit/s", xlabel="workers", ylabel="seconds per step")
        for other in ("fp32", "fp16", "PowerSGD", "PowerSGD fp16"):
            below = [
                row["LQ-SGD 8 bits beats below [Gbit/s]"][w][other] or math.nan for w in WORKERS
            ]
            axes[1][column].loglog(WORKERS, below, label=other)
        axes[1][column].set(
            title="LQ-SGD, 8 bits, is cheaper below", xlabel="workers", ylabel="Gbit/s"
        )
        for ax in axes[:, column]:
            ax.grid(alpha=0.3)
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_formatter(LogFormatter())
            ax.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    for ax in axes[:, 0]:
        ax.legend(fontsize=7)
    return figure
