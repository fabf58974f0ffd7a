"""What recovery by distillation costs on random weights of LLaVA-1.5's shape: tokens per second and
memory.

The steps are those of `recover`, with the dense model and the pruned one in memory. Pictures and
answers are noise with as many tokens as LLaVA-1.5's: their content changes no time.
"""

import contextlib
import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hipp_ext.budget import keep_counts
from hipp_ext.calibration import Batch
from hipp_ext.cli.console import check_dtype
from hipp_ext.errors import DataError
from hipp_ext.evals.measuring import resident
from hipp_ext.evals.studies.measuring import Save, report, run_command
from hipp_ext.evals.studies.shapes import (
    QUESTION_TOKENS,
    Hidden,
    InDtype,
    Layers,
    OnDevice,
    OutFile,
    check_hidden,
    noise,
    random_llava,
)
from hipp_ext.groups import find_groups
from hipp_ext.recover import ModelTeacher, RecoverSettings, recover
from hipp_ext.surgery.checkpoint import resolve_device
from hipp_ext.surgery.prune import prune
from hipp_ext.units import plan_from_counts

WARM_UP = 2  # steps: optimizers make their states, kernels are chosen
MODES: dict[str, dict[str, Any]] = {
    "full": {"gradient_checkpointing": True},
    "lora": {"train": "lora", "gradient_checkpointing": True},
}


@dataclass(frozen=True, kw_only=True)
class RecoveryCostSize:
    """What is measured.

    Attributes:
        hidden: width of the language tower; 4096 makes the 7B model.
        layers: number of layers of the language tower; 32 make the 7B model.
        pruning_ratio: fraction of the prunable parameters that the student has lost.
        rows: rows of a step.
        steps: steps that are timed, after those of the warm-up.
    """

    hidden: int = 512
    layers: int = 4
    pruning_ratio: float = 0.3
    rows: int = 4
    steps: int = 5


class _Enough(Exception):
    """All steps that are timed are done; `recover` would write a checkpoint after the last one."""


class _Clocked:
    """The same batch for every step, and when each step began."""

    token_mean = True

    def __init__(self, batch: Batch, steps: int):
        self.batch, self.steps, self.begins = batch, steps, list[float]()

    def batches(self, rank: int, workers: int, start: int) -> Iterator[list[Batch]]:
        """See `DataSource`. Raises _Enough after the steps."""
        self.begins.clear()  # of an iterator that only looked at the first batch
        for _ in range(self.steps):
            self.begins.append(time.perf_counter())
            yield [self.batch]
        self.begins.append(time.perf_counter())
        raise _Enough


def run(
    size: RecoveryCostSize | None = None,
    *,
    modes: tuple[str, ...] = tuple(MODES),
    device: str | None = None,
    dtype: str | None = None,
    save: bool = False,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure each mode, one after another; also prints the result.

    Args:
        size: size of the model and of the steps.
        modes: names of MODES.
        device: torch device; None: the GPU if there is one.
        dtype: name of a torch dtype; None: float32. Trained parameters are float32 anyway.
        save: write the result to results/recovery_cost.json.
        out: also write the result to this file.
    """
    size, place = size or RecoveryCostSize(), resolve_device(device)
    kind = getattr(torch, dtype or "float32")
    teacher = ModelTeacher(_llava(size, place, kind))
    batch = answered(size.rows)
    values: dict[str, Any] = {"size": asdict(size), "dtype": dtype or "float32"}
    values["teacher_parameters"] = _parameters(teacher.model)
    for mode in modes:
        student = _llava(size, place, kind)
        groups = find_groups(student)
        scores = {g.name: torch.arange(g.width, 0, -1.0) for g in groups}
        plan = plan_from_counts(groups, keep_counts(groups, None, size.pruning_ratio), scores)
        student = prune(student, plan, inplace=True)
        values["student_parameters"] = _parameters(student)
        values[mode] = _measured(student, teacher, batch, size.steps, mode, place)
        del student
        gc.collect()
    return report("recovery_cost", values, save, device=place, out=out)


def answered(rows: int) -> Batch:
    """One batch of noise; its words, behind the picture, are labels."""
    (batch,) = noise(rows, at_once=rows)
    labels = batch["input_ids"].clone()
    labels[:, :-QUESTION_TOKENS] = -100
    return {**batch, "labels": labels}


def _measured(
    student: Any, teacher: ModelTeacher, batch: Batch, steps: int, mode: str, place: str
) -> dict[str, float]:
    """Seconds of a step, tokens per second and the peak of memory."""
    source, cuda = _Clocked(batch, WARM_UP + steps), place.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats(place)
    else:
        resident("VmHWM", reset=True)
    settings = RecoverSettings(
        steps=source.steps + 1, save_every=source.steps + 1, optimizer="adamw", **MODES[mode]
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Enough):
        recover(student, source, settings, folder=folder, teacher=teacher, progress=False)
    peak = torch.cuda.max_memory_allocated(place) / 2**20 if cuda else resident("VmHWM")
    ends = source.begins[WARM_UP:]
    seconds = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    tokens, learnt = batch["input_ids"].numel(), int((batch["labels"] != -100).sum())
    middle = statistics.median(seconds)
    return {
        "seconds": middle,
        "least_seconds": min(seconds),
        "most_seconds": max(seconds),
        "tokens_per_second": tokens / middle,
        "learnt_tokens_per_second": learnt / middle,
        "peak_mib": peak,
    }


def _llava(size: RecoveryCostSize, place: str, kind: torch.dtype) -> Any:
    return random_llava(size.hidden, size.layers, whole=True, device=place, dtype=kind)


def _parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def main(
    hidden: Hidden = 512,
    layers: Layers = 4,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a step, 637 tokens each.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 5,
    mode: Annotated[
        list[str] | None, typer.Option(help="full or lora; may be repeated. Default: both.")
    ] = None,
    device: OnDevice = None,
    dtype: InDtype = "float32",
    out: OutFile = None,
    save: Save = False,
) -> None:
    """Measure recovery by distillation: seconds of a step, tokens per second, and memory.

    Examples:

    `python -m hipp_ext.evals.studies.recovery_cost`

    `python -m hipp_ext.evals.studies.recovery_cost --hidden 4096 --layers 32 --rows 8
    --dtype bfloat16` is LLaVA-1.5-7B without 30%, for a GPU of 140 GB; `--mode lora` needs 40 GB
    """
    check_dtype(dtype)
    check_hidden(hidden)
    if unknown := sorted(set(mode or ()) - set(MODES)):
        raise DataError(f"--mode {unknown[0]}: one of {', '.join(MODES)} is needed.")
    size = RecoveryCostSize(hidden=hidden, layers=layers, rows=rows, steps=steps)
    modes = tuple(mode or MODES)
    run(size, modes=modes, device=device, dtype=dtype, save=save, out=out)


if __name__ == "__main__":
    run_command(main)
