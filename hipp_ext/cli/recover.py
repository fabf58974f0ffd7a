"""`hipp recover`: fine-tune a pruned model, on one process or on those of `torchrun`."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from hipp_ext.cli import recover_options as options
from hipp_ext.cli.console import (
    Device,
    Dtype,
    ModelArgument,
    Overwrite,
    load_model,
    model_folder,
    own_device,
    require_apart,
    require_model,
)
from hipp_ext.cli.output import (
    Json,
    next_command,
    only_json,
    print_report,
    say,
    shell,
    shows_progress,
    warn,
)
from hipp_ext.cli.teacher import TeacherOptions
from hipp_ext.errors import DataError
from hipp_ext.files import require_new

recover_app = typer.Typer()


@recover_app.command("train")
def recover_command(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the recovered model.")],
    data: options.Data = None,
    image_folder: options.ImageFolder = None,
    sequence_length: options.SequenceLength = None,
    packed: options.Packed = False,
    holdout: options.Holdout = 0.0,
    measure: options.MeasureFiles = None,
    pope: options.Pope = None,
    scienceqa: options.ScienceQA = None,
    batch_size: options.BatchSize = 8,
    teacher: options.TeacherFolder = None,
    teacher_device: options.TeacherDevice = None,
    teacher_dtype: options.TeacherDtype = None,
    temperature: options.Temperature = 1.0,
    positions: options.PositionsOption = "answers",
    top_k: options.TopK = None,
    cross_entropy_share: options.CrossEntropyShare = 0.0,
    hidden_share: options.HiddenShare = 0.0,
    hidden_layers: options.HiddenLayers = None,
    steps: options.Steps = 400,
    accumulation: options.Accumulation = 1,
    train: options.TrainOption = "full",
    lora_rank: options.LoraRank = 16,
    freeze_vision: options.FreezeVision = False,
    optimizer: options.OptimizerName = None,
    lr: options.Lr = None,
    muon_lr: options.MuonLr = 0.01,
    schedule: options.Schedule = "trapezoid",
    warmup: options.Warmup = None,
    precision: options.PrecisionOption = "auto",
    gradient_checkpointing: options.GradientCheckpointing = False,
    evaluate_every: options.EvaluateEvery = None,
    keep: options.Keep = None,
    patience: options.Patience = None,
    save_every: options.SaveEvery = 50,
    seed: options.Seed = 0,
    compression: options.Compression = "lqsgd",
    rank: options.Rank = 4,
    bits: options.Bits = 8,
    transport: options.Transport = "auto",
    local_steps: options.LocalSteps = None,
    outer_lr: options.OuterLr = 1.0,
    outer_momentum: options.OuterMomentum = 0.0,
    sharding: options.Sharding = "none",
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a pruned model. An interrupted run goes on from its last checkpoint.

    With --teacher it learns what the dense model says, otherwise what the data says. Without any
    data it is trained on built-in questions about a toy world. The folder OUT.recover has the
    report, and checkpoints that contain gradients of the training data.

    Examples:

    `hipp recover ./pruned --teacher ./dense --data chats.jsonl --holdout 0.02 -o ./recovered`

    `hipp recover ./pruned --data chats.jsonl --train lora --lr 2e-4 -o ./recovered`

    `torchrun --nproc-per-node 2 -m hipp_ext recover ./pruned --pope POPE_train.tsv -o ./recovered`
    """
    given = options.with_recipe(dict(locals()))
    only_json(as_json)
    from hipp_ext.recover import RecoverSettings, recover
    from hipp_ext.recover.processes import join_processes
    from hipp_ext.recover.report import REPORT, report_lines, skipped_line
    from hipp_ext.surgery.checkpoint import save_pruned

    settings = RecoverSettings(
        **{f.name: given[f.name] for f in fields(RecoverSettings) if f.name in given}
    )
    position, workers = join_processes()
    require_model(model)
    asked = TeacherOptions(folder=teacher, device=teacher_device, dtype=teacher_dtype)
    require_new(out, overwrite)
    files = [file for file in (pope, scienceqa) if file]
    if data and files:
        raise DataError("Give --data, or --pope and --scienceqa: the data come from one of them.")
    inputs = [*files, *(measure or []), *(file for file in (data, teacher) if file)]
    require_apart(out, Path(model_folder(model)), *inputs)
    running = out.with_name(out.name + ".recover")
    own = device or (own_device() if workers > 1 else None)
    # A model that is spread over the processes stays on the CPU, whole.
    loaded, processor = load_model(model, "cpu" if sharding == "fsdp" else own, dtype)
    if data:
        rows = file_data(data, processor, given)
    elif files:
        rows = _question_data(processor, files, batch_size, seed, running, position)
    else:
        rows = _testbed_data(processor, batch_size, seed, position)
    result = recover(
        loaded,
        rows,
        settings,
        folder=running,
        teacher=asked.load(own),
        measure=_evaluator(loaded, processor, measure, running, position) if measure else None,
        progress=shows_progress(),
    )
    if position:
        return
    save_pruned(loaded, out, processor, overwrite=overwrite)
    if lost := skipped_line(result):
        warn(lost)
    first, *more = report_lines(result)
    sent = ""
    if stats := result.stats:
        sent = f"; sent {stats['bytes_sent']:,} bytes, fp32 {stats['dense_bytes']:,}"
        sent += f" ({stats['exchanges']} exchanges)" if "exchanges" in stats else ""
    say("\n".join([f"{out}: {first}{sent}; progress: {running}", *more]))
    next_command(
        _evaluation(loaded, Path(model_folder(model)), out), shell("hipp", "check-serving", out)
    )
    if as_json:
        print_report(running / REPORT)


def _evaluation(model: Any, pruned: Path, folder: Path) -> str:
    """A command that evaluates a recovered model: one that sees, or one that reads."""
    from hipp_ext.calibration.processors import image_token_id

    if image_token_id(model) is not None:
        return shell("vlmeval", "--data", "POPE", "--model", folder)
    return shell("hipp", "perplexity", pruned, folder, "--data", "held-out.jsonl")


def file_data(file: Path, processor: Any, given: dict[str, Any]) -> Any:
    """The rows of a file; published test sets are refused."""
    from hipp_ext.evals.tables import published_name
    from hipp_ext.recover import FileData

    if file.suffix.lower() == ".tsv" and published_name(file) not in (None, "ScienceQA_VAL"):
        raise DataError(
            f"{file} is the published {published_name(file)}, a test set: train on other questions."
        )
    names = ("image_folder", "sequence_length", "batch_size", "packed", "holdout", "seed")
    return FileData(file, processor, **{name: given[name] for name in names})


def _evaluator(
    model: Any, processor: Any, files: Sequence[Path], running: Path, position: int
) -> Any:
    """The evaluator on the questions of TSVs, one of each kind; all towers may change.

    Only the first process has it, as only that one evaluates.
    """
    if position:
        return lambda model: {}
    from hipp_ext.evals.evaluator import Evaluator
    from hipp_ext.evals.questions import table_questions
    from hipp_ext.evals.tables import YES_NO, read_table

    by_kind: dict[bool, Any] = {}
    for file in files:
        table = read_table(file, running / "images.measure")
        by_kind[table.kind == YES_NO] = table_questions(table)
    if set(by_kind) != {True, False} or len(files) != 2:
        raise DataError("--measure is given twice: a POPE-like TSV and a multiple-choice one.")
    return Evaluator(model, processor, by_kind[True], by_kind[False], towers=("language", "vision"))


def _testbed_data(processor: Any, rows: int, seed: int, position: int) -> Any:
    """The built-in questions, with a warning if the model is not the testbed's."""
    from hipp_ext.recover import TestbedData
    from hipp_ext.testbed.model import is_own_processor

    data = TestbedData(processor, seed, batch_size=rows)
    if position == 0 and not is_own_processor(processor):
        warn(
            "the built-in pictures and questions are a toy, to see that it runs; pass your own "
            "with --data."
        )
    return data


def _question_data(
    processor: Any, files: list[Path], rows: int, seed: int, running: Path, position: int
) -> Any:
    """Questions of TSVs; the published test sets are refused."""
    from hipp_ext.evals.questions import table_questions
    from hipp_ext.evals.tables import KNOWN, read_table
    from hipp_ext.recover import QuestionData

    tasks = []
    for file in files:
        name = file.stem if file.stem in KNOWN else None
        table = read_table(file, running / f"images.{position}", name=name)
        if table.official and file.stem != "ScienceQA_VAL":
            raise DataError(
                f"{file} is the published {file.stem}, a test set: train on other questions."
            )
        tasks.append(table_questions(table))
    return QuestionData(processor, tasks, rows, seed)
