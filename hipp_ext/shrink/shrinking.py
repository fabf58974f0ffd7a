"""`shrink`: what is asked is checked, then the rounds run."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from hipp_ext.allocators import Sensitivity
from hipp_ext.calibration import Calibration, CalibrationLike, find_processor
from hipp_ext.errors import HippError
from hipp_ext.fingerprint import model_digest
from hipp_ext.recover import ModelTeacher, Teacher
from hipp_ext.recover.data import DataSource
from hipp_ext.runs import RunFolder
from hipp_ext.shrink.planning import Planner, Standing, check_reach, planner_identity
from hipp_ext.shrink.report import ShrinkReport
from hipp_ext.shrink.rounds import Rounds
from hipp_ext.shrink.settings import ShrinkSettings
from hipp_ext.surgery.checkpoint import load_pruned


def shrink(
    model: str | Path | nn.Module,
    data: DataSource,
    settings: ShrinkSettings,
    *,
    folder: str | Path,
    teacher: Teacher | nn.Module | None = None,
    planner: Planner | None = None,
    calibration: CalibrationLike | None = None,
    processor: Any = None,
    device: str | None = None,
    dtype: Any = None,
    progress: bool = True,
    log: Callable[[str], None] | None = None,
) -> ShrinkReport:
    """Prune a model in rounds, each of which recovers by distillation from the dense model.

    Round n leaves a complete model folder `folder/round-n`. Its plan is the one of the dense model
    that says what stays in total. `folder/round-n.work` has the plan of the round itself and the
    report of its recovery, `folder/shrink.json` and `shrink.png` tell what all rounds did.
    Interrupted at any moment, the same call goes on, and ends with the same weights to the bit on
    the same hardware.

    A round plans on the model as it is then (`round_plan`), leaves blocks as they are that were
    pruned in other units than the planner's before, and removes what is missing to its
    ratio of the dense model's prunable parameters (`ShrinkSettings.ratios`). The last one meets
    `settings.to` as exactly as a single plan does.

    Under `torchrun` every process calls it alike: the first one plans, prunes and writes, all of
    them recover.

    Args:
        model: model folder, or a model, which may be pruned already. A model stays as it is, but
            as the teacher it is frozen.
        data: data of the recoveries. Without held-out rows the report has no losses on them.
        settings: how much goes, in how many rounds.
        folder: folder of the run.
        teacher: the dense model, or what it said (`CachedTeacher`); None: `model`.
        planner: decides what goes; its own pruning_ratio is not read. None: `Sensitivity`.
        calibration: batches for planning and for reconstruction; None: 128 rows of the training
            data.
        processor: processor of the model; None: the one beside its weights.
        device, dtype: of a model that is loaded from a folder; see `load_pruned`.
        progress: show progress bars.
        log: called with a line at the beginning of every round, and on what the run takes on disk.

    Raises:
        BudgetError: `settings.to` cannot be reached, or as much is gone already.
        CheckpointError: `folder` holds another run, or is damaged.
        HippError: `model` is pruned already, and no teacher was given; or as `recover`.
    """
    if isinstance(model, nn.Module):
        dense = model
    else:
        dense = load_pruned(model, device=device, dtype=dtype)
    planner = Sensitivity(pruning_ratio=0.0) if planner is None else planner
    processor = processor or find_processor(dense)
    start = Standing.of(dense, planner)
    if start.total.pruning_ratio and teacher is None:
        raise HippError(
            f"The model is pruned already, by {start.total.pruning_ratio:.1%}, and cannot be the "
            "teacher: give the dense model, or what it said (--teacher)."
        )
    check_reach(start, planner, settings.to)
    if calibration is not None:
        calibration = Calibration.of(dense, calibration, processor)
    if isinstance(teacher, nn.Module) or teacher is None:
        teacher = ModelTeacher(dense if teacher is None else teacher, processor=processor)
    own = settings.recover
    teacher.check(temperature=own.temperature, positions=own.positions, top_k=own.top_k)
    several = dist.is_available() and dist.is_initialized()
    identity = {
        "settings": {n: v for n, v in asdict(settings).items() if n != "only_last"},
        "planner": planner_identity(planner),
        "model": model_digest(dense, ()),
        "teacher": dict(teacher.identity),
        "data": getattr(data, "identity", None),
        "calibration": None if calibration is None else calibration.digest,
        "processes": dist.get_world_size() if several else 1,
    }
    rank = dist.get_rank() if several else 0
    with RunFolder(folder, identity, owner=rank == 0) as run:
        rounds = Rounds(
            run=run,
            settings=settings,
            dense=dense,
            start=start.total,
            data=data,
            teacher=teacher,
            planner=planner,
            calibration=calibration,
            processor=processor,
            progress=progress,
            log=log if log and rank == 0 else _silent,
            rank=rank,
        )
        del model, dense  # where it is not the teacher, it goes after the first round
        return rounds.complete()


def _silent(line: str) -> None:
    pass
