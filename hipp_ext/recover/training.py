"""The training loop of `hipp recover`: one process, or several with DDP or FSDP2."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import nn

from hipp_ext.errors import HippError
from hipp_ext.files.sealed import text_digest
from hipp_ext.plan import PruningPlan
from hipp_ext.recover.checkpoints import Checkpoints
from hipp_ext.recover.data import DataSource
from hipp_ext.recover.distillation import Distillation
from hipp_ext.recover.evaluation import Measure
from hipp_ext.recover.loop import Run
from hipp_ext.recover.objectives import CrossEntropy, Objective
from hipp_ext.recover.parameters import frozen_digest, in_bfloat16, prepared
from hipp_ext.recover.processes import Processes, processes
from hipp_ext.recover.report import write_report
from hipp_ext.recover.settings import RecoverResult, RecoverSettings
from hipp_ext.recover.teachers import ModelTeacher, Teacher
from hipp_ext.surgery.masks import PLAN_ATTRIBUTE

# Settings that say what is learnt from a teacher.
OF_A_TEACHER = (
    "temperature",
    "positions",
    "top_k",
    "cross_entropy_share",
    "hidden_share",
    "hidden_layers",
)


def recover(
    model: nn.Module,
    data: DataSource,
    settings: RecoverSettings,
    *,
    folder: str | Path,
    teacher: Teacher | nn.Module | None = None,
    measure: Measure | None = None,
    progress: bool = True,
) -> RecoverResult:
    """Fine-tune `model` in place; it ends in eval mode, equal on every process.

    One process calls this, or all processes of a group. An interrupted run goes on from its last
    checkpoint: the same call ends with the weights of an undisturbed run, bit for bit. The folder
    also gets recover.json, which says what was done, and recover.png, which shows the losses.

    Args:
        model: pruned model, such as from `load_pruned`. With sharding="fsdp" it stays where it is,
            such as on the CPU, and every process trains its share on its GPU.
        data: data source. Its held-out rows, if it has any, are evaluated at intervals.
        settings: how the model is fine-tuned.
        folder: folder for checkpoints, on a disk that all processes share. Checkpoints contain
            gradients of the training data.
        teacher: the dense model, or what it said (`CachedTeacher`), which the pruned one learns
            from; None: it learns from the labels.
        measure: function of the model that is evaluated beside the held-out rows, on the first
            process, such as an `Evaluator` made with the vision tower among its `towers`.
        progress: whether the first process shows a progress bar.

    Raises:
        CheckpointError: `folder` holds another run, or is damaged; or the teacher has another
            vocabulary.
        OutputBusyError: another process works in `folder`.
        CompressionError: the processes have different models or settings, or one was lost.
        HippError: the loss is not finite (the rows of the file are named, and the last checkpoint
            stays), or the settings do not fit the model or the data.
        MissingExtraError: accelerate, or peft for adapters, is not installed.
    """
    if not len(getattr(data, "held", ())) and (settings.keep == "best" or settings.patience):
        raise HippError(
            "The best weights and early stopping need held-out rows: give a FileData with holdout "
            "above 0 (--holdout)."
        )
    if measure is not None and settings.sharding == "fsdp":
        raise HippError("measure= needs the whole model in one process: sharding='none'.")
    objective = _objective(teacher, settings)
    bf16 = in_bfloat16(model, settings)
    with (
        processes(model, settings, bf16) as group,
        prepared(model, settings) as running,
        _checkpointed(model, settings.gradient_checkpointing),
    ):
        run = Run(running, data, settings, objective, group, measure)
        identity = _identity(running, data, settings, objective, group)
        checkpoints = Checkpoints(
            Path(folder), identity, group.rank, group.barrier, alone=run.outer is not None
        )
        with checkpoints.run:
            checkpoints.check_shared(group.gathered)
            result = run.train(checkpoints, progress and group.rank == 0)
            run.give_back()
        if group.rank == 0:
            write_report(Path(folder), result, identity)
    model.eval()
    return result


def _objective(teacher: Teacher | nn.Module | None, settings: RecoverSettings) -> Objective:
    chosen: dict[str, Any] = {name: getattr(settings, name) for name in OF_A_TEACHER}
    if teacher is None:
        usual = {field.name: field.default for field in fields(settings)}
        if given := [f"{name}={own!r}" for name, own in chosen.items() if own != usual[name]]:
            raise HippError(
                f"{', '.join(given)}: this is about what is learnt from a teacher, and there is "
                "none. Give the dense model (teacher=, --teacher), or leave it out."
            )
        return CrossEntropy()
    return Distillation(
        ModelTeacher(teacher) if isinstance(teacher, nn.Module) else teacher, **chosen
    )


def _identity(
    model: nn.Module, data: Any, settings: RecoverSettings, objective: Objective, group: Processes
) -> dict[str, Any]:
    plan: PruningPlan | None = getattr(model, PLAN_ATTRIBUTE, None)
    # The layers are in the identity of the objective.
    return {
        **{name: value for name, value in asdict(settings).items() if name != "hidden_layers"},
        "processes": group.workers,
        "data": getattr(data, "identity", None),
        "objective": dict(objective.identity),
        "plan": text_digest(plan.to_json()) if plan else None,
        "shapes": {n: list(p.shape) for n, p in model.named_parameters()},
        "frozen": frozen_digest(model),
    }


@contextlib.contextmanager
def _checkpointed(model: Any, wanted: bool) -> Iterator[None]:
    """Inside the block the layers keep no activations, if `wanted`."""
    if not wanted:
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise HippError(f"{type(model).__name__} has no gradient checkpointing.")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
