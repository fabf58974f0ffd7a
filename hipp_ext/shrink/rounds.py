"""Prune, recover, prune again: a chain of stages, each of which reads folders and writes one.

A stage reads its model from the folder that the stage before wrote, also where nothing was
interrupted: so an interruption changes nothing. In the folder of a run,

    round-1.work/plan.json    plan of the round, for the model that the round begins with
    round-1.work/pruned/      the pruned model, until the round is complete
    round-1.work/recover/     the recovery; its checkpoints go when the round is complete
    round-1/                  the model that the round leaves
    shrink.json               the rounds that are complete; written last
"""

import contextlib
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hipp_ext.calibration import Calibration
from hipp_ext.plan import PruningPlan
from hipp_ext.recover import FileData, Teacher, recover
from hipp_ext.runs import RunFolder
from hipp_ext.shrink.planning import Planner, round_plan
from hipp_ext.shrink.report import Minutes, Round, ShrinkReport, disk_bytes, round_folder
from hipp_ext.shrink.settings import ShrinkSettings
from hipp_ext.surgery.checkpoint import load_pruned, save_pruned
from hipp_ext.surgery.masks import PLAN_ATTRIBUTE
from hipp_ext.surgery.prune import prune

CALIBRATION_ROWS = 128
POLL_SECONDS = 0.2


@dataclass(kw_only=True)
class Rounds:
    """The rounds of a run.

    Attributes:
        run: folder of the run.
        settings, data, teacher, planner, processor, progress, log: see `shrink`.
        dense: the model that the run begins with.
        start: plan of the dense model that says what of it stays before the first round.
        calibration: batches for planning and reconstruction; None: rows of the training data.
        rank: number of this process.
    """

    run: RunFolder
    settings: ShrinkSettings
    dense: nn.Module | None
    start: PruningPlan
    data: Any
    teacher: Teacher
    planner: Planner
    calibration: Calibration | None
    processor: Any
    progress: bool
    log: Callable[[str], None]
    rank: int

    def __post_init__(self) -> None:
        assert self.dense is not None
        parameters = list(self.dense.parameters())
        sharded = self.settings.recover.sharding == "fsdp"
        self._device = "cpu" if sharded else str(parameters[0].device)
        self._ratios = self.settings.ratios(self.start.pruning_ratio)
        self._size = sum(p.numel() for p in parameters)
        self._bytes = sum(p.numel() * p.element_size() for p in parameters)
        self._minutes = dict[str, float]()

    def complete(self) -> ShrinkReport:
        """Run the rounds that are not complete."""
        settings, gone = self.settings, self.start.pruning_ratio
        first = ShrinkReport(to=settings.to, start_ratio=gone, start_parameters=self._size)
        report = ShrinkReport.read(self.run, first)
        for done in report.rounds:
            self._clean(done.number)
        if len(report.rounds) < settings.steps:
            self._tell_disk_use()
        for number in range(len(report.rounds) + 1, settings.steps + 1):
            self._tell_round(number, report)
            report = report.and_round(self._round(number))
            if self.rank == 0:
                report.write(self.run.path)
                self._clean(number)
        return report

    def _round(self, number: int) -> Round:
        work = self.run / f"{round_folder(number)}.work"
        self._minutes = {"plan": 0.0, "prune": 0.0}
        if self.rank == 0 and not _complete(work / "pruned"):
            self._prune(number, work)
        self.dense = None
        while not _complete(work / "pruned"):  # planning may take longer than a barrier waits
            time.sleep(POLL_SECONDS)
        student = load_pruned(work / "pruned", device=self._device)
        with self._timed("recover"):
            result = recover(
                student,
                self.data,
                self.settings.recovery(number),
                folder=work / "recover",
                teacher=self.teacher,
                progress=self.progress,
            )
        if self.rank == 0:
            save_pruned(student, self.run / round_folder(number), self.processor, overwrite=True)
        return Round.of(
            result,
            number=number,
            ratio_asked=self._ratios[number - 1],
            ratio=getattr(student, PLAN_ATTRIBUTE).pruning_ratio,
            parameters=sum(p.numel() for p in student.parameters()),
            minutes=Minutes(**self._minutes),
        )

    def _prune(self, number: int, work: Path) -> None:
        """Plan on the model that the round before left, prune it, and write it to work/pruned."""
        source: Any = self.dense
        if number > 1:
            source = load_pruned(self.run / round_folder(number - 1), device=self._device)
        calibration = self.calibration or Calibration.from_batches(_some_rows(self.data))
        file = work / "plan.json"
        if not file.is_file():
            with self._timed("plan"):
                ratio = self._ratios[number - 1]
                options = (calibration, self.processor, self.progress)
                round_plan(source, self.planner, ratio, *options).save(file)
        with self._timed("prune"):
            small = prune(
                source,
                file,
                inplace=number > 1,
                reconstruct=self.settings.reconstruct,
                calibration=calibration,
                processor=self.processor,
            )
            save_pruned(small, work / "pruned", self.processor)

    def _clean(self, number: int) -> None:
        """Remove what a complete round no longer needs."""
        if self.rank:
            return
        work = self.run / f"{round_folder(number)}.work"
        old = [work / "pruned", *(work / "recover").glob("step-*")]
        if self.settings.only_last and number > 1:
            old.append(self.run / round_folder(number - 1))
        for folder in old:
            shutil.rmtree(folder, ignore_errors=True)

    def _tell_round(self, number: int, report: ShrinkReport) -> None:
        rest = range(number, self.settings.steps + 1)
        left = report.minutes_left([self.settings.recovery(n).steps for n in rest])
        gone = report.rounds[-1].ratio if report.rounds else report.start_ratio
        line = (
            f"round {number} of {self.settings.steps}: {gone:.1%} -> "
            f"{self._ratios[number - 1]:.1%} of the prunable parameters removed"
        )
        if left is not None:
            line += f", about {max(1, round(left))} min left"
        self.log(line)

    def _tell_disk_use(self) -> None:
        prunable = sum(g.width * g.unit_parameters for g in self.start.groups)
        gone, path = self.start.pruning_ratio, self.run.path
        needed = disk_bytes(
            [self._size - round((ratio - gone) * prunable) for ratio in self._ratios],
            parameter_bytes=self._bytes / self._size,
            trained=self.settings.recover.train == "full",
            only_last=self.settings.only_last,
        )
        free = shutil.disk_usage(path).free
        self.log(f"{path}: the run takes up to {_size(needed)}; {_size(free)} of disk are free")
        if needed > free and self.rank == 0:
            warnings.warn(
                f"{path}: the run may take {_size(needed)}, and {_size(free)} of disk are free. "
                "only_last=True (--only-last) keeps only the last model.",
                stacklevel=4,
            )

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self._minutes[stage] = (time.monotonic() - begin) / 60


def _complete(folder: Path) -> bool:
    """Whether `save_pruned` wrote the folder: it is renamed when all files are there."""
    return (folder / "config.json").is_file()


def _some_rows(data: Any) -> list[Any]:
    """Batches of the training data, for planning and reconstruction."""
    if isinstance(data, FileData):
        return data.sample(CALIBRATION_ROWS)
    batches, rows = list[Any](), 0
    for step in data.batches(0, 1, 0):
        batches += step
        rows += sum(len(batch["input_ids"]) for batch in step)
        if rows >= CALIBRATION_ROWS:
            break
    return batches


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
