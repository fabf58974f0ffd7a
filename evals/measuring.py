"""Measured times, memory, and the machine that they belong to."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hipp_ext import __version__


def paired_ratio(times: Mapping[str, list[float]], slow: str, fast: str) -> dict[str, float]:
    """How many times longer `slow` takes than `fast`: median, least, most and n of the paired
    ratios. With six pairs or more also low and high, the 95% interval of the median.
    """
    ratios = [a / b for a, b in zip(times[slow], times[fast], strict=True)]
    return {
        "median": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "n": len(ratios),
        **_median_interval(sorted(ratios)),
    }


def _median_interval(ordered: list[float], level: float = 0.95) -> dict[str, float]:
    """Low and high ends of the interval of the median, by the sign test: it holds whatever the
    distribution is. Empty where even the whole range is not as certain.

    Source: Conover, Practical Nonparametric Statistics (3rd ed., 1999), section 3.2.
    """
    from scipy.stats import binom

    skipped = int(binom.ppf((1 - level) / 2, len(ordered), 0.5)) - 1  # values below the low end
    return {"low": ordered[skipped], "high": ordered[-1 - skipped]} if skipped >= 0 else {}


def timed(device: str | torch.device, work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """The return value of `work`, and its cost: seconds, and on CUDA extra_mib.

    extra_mib is the peak of allocated memory above what was allocated before the call.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    result = work()
    if cuda:
        torch.cuda.synchronize(device)
    cost = {"seconds": time.perf_counter() - start}
    if cuda:
        cost["extra_mib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return result, cost


def resident(field: str, reset: bool = False) -> float:
    """A field of this process's /proc/self/status [MiB]; NaN where there is no /proc.

    Args:
        field: "VmRSS" (memory now) or "VmHWM" (its peak).
        reset: also restart the peak from now.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def describe(command: str, values: Mapping[str, Any], device: str | None = None) -> dict[str, Any]:
    """`values` with the command, the date, the device, the number of threads and the versions.

    Args:
        command: the command line that produced the values.
        values: what was measured.
        device: the device that was measured; None: the GPU if there is one.
    """
    known = about(device)
    assert not known.keys() & values.keys(), known.keys() & values.keys()
    return {"command": command, **values, **known}


def about(device: str | None = None) -> dict[str, Any]:
    """When (UTC), on what and with which versions something is measured.

    Args:
        device: the device that is measured; None: the GPU if there is one.
    """
    cuda = torch.cuda.is_available() if device is None else device.startswith("cuda")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {"hipp-ext": __version__} | {p: version(p) for p in ("torch", "transformers")},
    }


def cpu_name() -> str:
    """The model of the CPU where the system tells it, and its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, '')} {platform.machine()} CPU".strip()
