"""Paired timing: both sides in one run, taking turns, so that whatever else the machine does hits both."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from hipp_ext.errors import OutputExistsError
from hipp_ext.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"


def paired_times(
    sides: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Side -> `repeats` wall-clock times [s]; the sides take turns, and the first `warmup` rounds do not count."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(warmup + repeats):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            synchronise()
            if round_number >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: Mapping[str, list[float]], slow: str, fast: str) -> dict[str, float]:
    """How many times longer `slow` takes than `fast`: median of the paired ratios, least, most, n."""
    ratios = [a / b for a, b in zip(times[slow], times[fast], strict=True)]
    return {
        "median": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "n": len(ratios),
    }


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation; 0 where one of the two is constant, which follows nothing."""
    from scipy.stats import spearmanr

    if min(np.ptp(a), np.ptp(b)) == 0:
        return 0.0
    result: Any = spearmanr(a, b)
    return float(result.statistic)


def mean_and_se(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, its standard error (None below two values), and n."""
    n = len(values)
    return {
        "mean": statistics.fmean(values),
        "se": statistics.stdev(values) / n**0.5 if n > 1 else None,
        "n": n,
    }


def claim_folder(folder: Path, setting: object) -> None:
    """Make `folder` that of a study with this setting (what JSON can say), or confirm that it is: then the study goes on.

    Raises:
        OutputExistsError: it holds a study with another setting.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark, text = folder / "study.json", json.dumps(setting) + "\n"
    if mark.exists() and mark.read_text() != text:
        raise OutputExistsError(
            f"{folder} holds a study with another setting; choose another folder.\n there: {mark.read_text()} now:   {text}"
        )
    write_atomic(mark, text)


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spending(device: str | torch.device, work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work` returns; its seconds, and on CUDA the most memory that it took on top of what was there (extra_mib)."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    done = work()
    if cuda:
        torch.cuda.synchronize(device)
    spent = {"seconds": time.perf_counter() - start}
    if cuda:
        spent["extra_mib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return done, spent


def resident(field: str, reset: bool = False) -> float:
    """A field of this process's memory [MiB]; `reset` makes the peak start from now. NaN where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def describe(command: str, values: Mapping[str, Any], device: str | None = None) -> dict[str, Any]:
    """`values` with the command and the machine.

    Args:
        device: what was measured on; None: the GPU if there is one.
    """
    cuda = torch.cuda.is_available() if device is None else device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU"
    versions = {p: version(p) for p in ("torch", "transformers")}
    return {
        "command": command,
        **values,
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def show(
    name: str,
    result: Mapping[str, Any],
    *,
    save: bool,
    out: Path | None = None,
    quiet: bool = False,
) -> None:
    """Print a result, unless `quiet`; with `save` write it to results/<name>.json, with `out` to that file."""
    text = json.dumps(result, indent=1) + "\n"
    if not quiet:
        print(text, end="")
    for file in ([RESULTS / f"{name}.json"] if save else []) + ([out] if out else []):
        write_atomic(file, text)


def keep_picture(name: str, figure: "Figure", *, save: bool, folder: Path | None = None) -> None:
    """Write a picture to `folder`/<name>.png, and with `save` to results/<name>.png."""
    from hipp_ext.evals.figures import png

    picture = png(figure, dpi=110)
    for place in ([RESULTS] if save else []) + ([folder] if folder else []):
        write_atomic(place / f"{name}.png", picture)


def report(name: str, command: str, values: Mapping[str, Any], save: bool) -> dict[str, Any]:
    """`values` with the command and the machine; printed, and with `save` written to results/<name>.json."""
    result = describe(command, values)
    show(name, result, save=save)
    return result
