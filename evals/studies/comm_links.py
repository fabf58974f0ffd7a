"""Time per step over emulated slow links: two workers in network namespaces, joined by a bridge.

Model: an MLP 784-2048-1536-10 (4.77M parameters), batch 4 per worker, torch's own hooks with one
bucket (with more they abort on gloo). The links are emulated; see links.py.
"""

import json
import statistics
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from hipp_ext.evals.measuring import timed
from hipp_ext.evals.studies.links import bytes_out, missing, network, run_workers
from hipp_ext.evals.studies.measuring import Save, report, run_command

MODULE = "hipp_ext.evals.studies.comm_links"
# Name -> (kind, rank, bits).
CONFIGURATIONS: dict[str, tuple[str, int, int]] = {
    "fp32 all-reduce": ("fp32", 0, 32),
    "fp16 hook": ("fp16", 0, 16),
    "PowerSGD r32": ("powersgd", 32, 32),
    "PowerSGD r32 fp16": ("powersgd16", 32, 16),
    "LQ-SGD r32, 8 bits": ("lqsgd", 32, 8),
    "LQ-SGD r32, 4 bits": ("lqsgd", 32, 4),
    "PowerSGD r4": ("powersgd", 4, 32),
    "LQ-SGD r4, 8 bits": ("lqsgd", 4, 8),
    "LQ-SGD r4, 4 bits": ("lqsgd", 4, 4),
}
DENSE = ("fp32 all-reduce", "fp16 hook")
WARM_UP = 3


def main(
    steps: Annotated[int, typer.Option(min=2, help="Timed steps per configuration.")] = 12,
    save: Save = False,
    worker: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Time LQ-SGD and torch's own hooks over emulated links of 100 and 10 Mbit/s. Needs root.

    Example: `python -m hipp_ext.evals.studies.comm_links`
    """
    _train(worker, steps) if worker else run(steps=steps, save=save)


def run(rates: Sequence[int] = (100, 10), steps: int = 12, save: bool = False) -> dict[str, Any]:
    """Time every configuration at every rate [Mbit/s]; also prints the result. Times in seconds.

    Returns:
        The result; empty where links cannot be emulated.
    """
    if problem := missing():
        print(f"Skipped: {problem}")
        return {}
    table: dict[str, dict[str, Any]] = {}
    for rate in rates:
        # fp32 would take 16 s a step at 10 Mbit/s.
        names = [n for n in CONFIGURATIONS if rate >= 100 or (n not in DENSE and "r32" in n)]
        with network(2, rate) as spaces:
            rows = {name: _measure(spaces, name, steps) for name in names}
        table[f"{rate} Mbit/s"] = rows
        for name, row in rows.items():
            times = f"{1e3 * row['median']:8.1f} ms, least {1e3 * row['least']:.1f}"
            print(f"{rate} Mbit/s  {name:20} {times}, {row['bytes']:,} bytes")
    values = {"parameters": 4_770_314, "workers": 2, "steps": steps, "batch": 4, "table": table}
    values["times faster (medians)"] = {link: _ratios(rows) for link, rows in table.items()}
    return report("links", values, save)


def _ratios(rows: dict[str, Any]) -> dict[str, float]:
    pairs = {
        "fp32 all-reduce": "LQ",
        "PowerSGD r32": "LQ-SGD r32",
        "PowerSGD r32 fp16": "LQ-SGD r32",
        "PowerSGD r4": "LQ-SGD r4",
    }
    return {
        f"{fast} over {slow}": rows[slow]["median"] / rows[fast]["median"]
        for slow, start in pairs.items()
        for fast in rows
        if slow in rows and fast.startswith(start)
    }


def _measure(spaces: Sequence[str], name: str, steps: int) -> dict[str, Any]:
    printed = run_workers(MODULE, ["--worker", name, "--steps", str(steps)], spaces, 600)
    return json.loads(printed.strip().splitlines()[-1])


def _train(name: str, steps: int) -> None:
    """Train as one rank, and print the times as JSON."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    first, second, last = nn.Linear(784, 2048), nn.Linear(2048, 1536), nn.Linear(1536, 10)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)
    ddp = DistributedDataParallel(model, bucket_cap_mb=100)
    _register(ddp, *CONFIGURATIONS[name])
    generator = torch.Generator().manual_seed(dist.get_rank())
    images = torch.randn(4, 784, generator=generator)
    labels = torch.randint(10, (4,), generator=generator)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(ddp(images), labels).backward()
        optimizer.step()

    for _ in range(WARM_UP):
        step()
    times, start_bytes = [], bytes_out()
    for _ in range(steps):
        dist.barrier()
        times.append(timed("cpu", step)[1]["seconds"])
    sent = (bytes_out() - start_bytes) / steps
    with ddp.no_sync():
        alone = [timed("cpu", step)[1]["seconds"] for _ in range(steps)]
    row = {
        "median": statistics.median(times),
        "least": min(times),
        "most": max(times),
        "n": steps,
        "bytes": round(sent),
        "compute alone": statistics.median(alone),
    }
    print(json.dumps(row))
    dist.destroy_process_group()


def _register(ddp: Any, kind: str, rank: int, bits: int) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    from hipp_ext.comm import register_lqsgd

    power: Any = powerSGD_hook
    if kind == "lqsgd":
        register_lqsgd(ddp, rank=rank, bits=bits)
    elif kind == "fp16":
        ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif kind.startswith("powersgd"):
        state = power.PowerSGDState(
            None,
            matrix_approximation_rank=rank,
            start_powerSGD_iter=2,
            orthogonalization_epsilon=1e-8,
        )
        hook = power.powerSGD_hook
        ddp.register_comm_hook(
            state, default_hooks.fp16_compress_wrapper(hook) if kind == "powersgd16" else hook
        )


if __name__ == "__main__":
    run_command(main)
