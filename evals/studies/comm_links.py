"""Time per step over emulated slow links: two workers in network namespaces, joined by a bridge.

Model: an MLP 784-2048-1536-10 (4.77M parameters), batch 4 per worker, torch's own hooks with one
bucket (with more they abort on gloo). The links are virtual cables, shaped by tc's token bucket in
both directions, without delay or loss. The study needs root and iproute2. The namespaces' names
contain this process's id, and no others are touched.
"""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hipp_ext.evals.measuring import timed
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
ADDRESS = "10.77.0.{}"  # inside the namespaces


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
    if problem := _missing():
        print(f"Skipped: {problem}")
        return {}
    table: dict[str, dict[str, Any]] = {}
    for rate in rates:
        # fp32 would take 16 s a step at 10 Mbit/s.
        names = [n for n in CONFIGURATIONS if rate >= 100 or (n not in DENSE and "r32" in n)]
        with _network(2, rate) as spaces:
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


def _missing() -> str | None:
    if os.name != "posix" or not shutil.which("ip") or not shutil.which("tc"):
        return "emulated links need Linux with iproute2 (the commands ip and tc)."
    if os.geteuid() != 0:
        return "emulated links need root, because they use network namespaces."
    probe = f"hipp{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"this system does not permit network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=False)
    return None


@contextlib.contextmanager
def _network(workers: int, rate: int) -> Iterator[list[str]]:
    """Names of namespaces, each linked at `rate` Mbit/s to a bridge in one more namespace."""
    with contextlib.ExitStack() as stack:

        def namespace(name: str) -> str:
            full = f"hipp{os.getpid()}n{name}"
            _ip(f"netns add {full}")
            stack.callback(subprocess.run, ["ip", "netns", "del", full], check=False)
            return full

        hub = namespace("hub")
        _ip(f"-n {hub} link add br0 type bridge")
        _ip(f"-n {hub} link set br0 up")
        spaces = [namespace(str(i)) for i in range(workers)]
        for i, own in enumerate(spaces):
            _ip(f"-n {own} link set lo up")
            _ip(f"-n {own} link add e0 type veth peer name p{i} netns {hub}")
            _ip(f"-n {own} addr add {ADDRESS.format(i + 1)}/24 dev e0")
            _ip(f"-n {own} link set e0 up")
            _ip(f"-n {hub} link set p{i} master br0 up")
            for space, device in ((own, "e0"), (hub, f"p{i}")):
                shape = f"tbf rate {rate}mbit burst 32kb latency 100ms"
                _ip(f"netns exec {space} tc qdisc add dev {device} root {shape}")
        yield spaces


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)


def _measure(spaces: Sequence[str], name: str, steps: int) -> dict[str, Any]:
    processes = []
    for rank, space in enumerate(spaces):
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "e0",
            "MASTER_ADDR": ADDRESS.format(1),
            "MASTER_PORT": "29400",
            "RANK": str(rank),
            "WORLD_SIZE": str(len(spaces)),
        }
        command = ["ip", "netns", "exec", space, sys.executable, "-W", "ignore", "-m", MODULE]
        command += ["--worker", name, "--steps", str(steps)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
    outputs = [p.communicate(timeout=600)[0] for p in processes]
    if any(p.returncode for p in processes):
        raise RuntimeError(f"{name}: a worker ended with {[p.returncode for p in processes]}.")
    return json.loads(outputs[0].strip().splitlines()[-1])


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
    times, start_bytes = [], _bytes_out()
    for _ in range(steps):
        dist.barrier()
        times.append(timed("cpu", step)[1]["seconds"])
    sent = (_bytes_out() - start_bytes) / steps
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


def _bytes_out() -> int:
    return int(Path("/sys/class/net/e0/statistics/tx_bytes").read_text())


if __name__ == "__main__":
    run_command(main)
