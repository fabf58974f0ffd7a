"""Memory that a generation adds to a process on a CPU, each model in its own process (Linux)."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from hipp_ext.evals.generation import Workload, place, prompts, token_seconds
from hipp_ext.evals.measuring import resident
from hipp_ext.surgery.checkpoint import load_pruned


def extra_mib_on_cpu(
    folders: Sequence[Path], workload: Workload, dtype: str | None, inputs: Path | None = None
) -> list[float]:
    """Memory that a generation adds to a process that holds the model [MiB], for every folder.

    Args:
        folders: model folders.
        workload: what every model generates.
        dtype: name of a torch dtype; None: as stored.
        inputs: safetensors file with the inputs of all models; None: see `prompts`.

    Returns:
        One number per folder; NaN where there is no /proc.
    """
    if not Path("/proc/self/clear_refs").exists():
        return [float("nan")] * len(folders)
    names = [str(f) for f in folders]
    code = (
        f"from {__name__} import Workload, measure_in_forks\n"
        f"print(measure_in_forks({names!r}, {workload!r}, {dtype!r}, {inputs and str(inputs)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    found = done.stdout.splitlines()[-1:] if not done.returncode else []
    if not found or "nan" in found[0]:
        raise RuntimeError(f"the memory of {folders} could not be measured:\n{done.stderr[-2000:]}")
    return json.loads(found[0])


def measure_in_forks(
    folders: Sequence[str], workload: Workload, dtype: str | None, inputs: str | None
) -> list[float]:
    """`own_extra_mib` of each folder, each in a fork of this process.

    This process must not have computed anything yet: a fork cannot share its thread pool.
    """
    found = []
    for folder in folders:
        reader, writer = os.pipe()
        if not (child := os.fork()):
            extra = own_extra_mib(folder, workload, dtype, inputs)
            os.write(writer, str(extra).encode())
            os._exit(0)
        os.close(writer)
        os.waitpid(child, 0)
        with os.fdopen(reader) as answer:
            found.append(float(answer.read() or "nan"))
    return found


def own_extra_mib(
    folder: str | Path,
    workload: Workload,
    dtype: str | None = None,
    inputs: str | Path | None = None,
) -> float:
    """Peak memory that a generation adds to this process [MiB]; NaN where there is no /proc.

    The process must do nothing else. Weights are touched first, because they are mapped from the
    file, and so is the code, by a generation of two tokens.
    """
    model = load_pruned(folder, dtype=getattr(torch, dtype) if dtype else None)
    batch = place(load_file(inputs) if inputs else prompts(model, workload), model)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.sum()
    token_seconds(model, {"input_ids": torch.ones(1, 4, dtype=torch.long)}, 2)
    before = resident("VmRSS", reset=True)
    token_seconds(model, batch, workload.new_tokens)
    return resident("VmHWM") - before
