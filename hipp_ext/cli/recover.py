"""`hipp recover`: fine-tune a pruned model, on one process or on those of `torchrun`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

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
    warn,
)
from hipp_ext.errors import DataError
from hipp_ext.files import require_new

recover_app = typer.Typer()


@recover_app.command("train")
def recover_command(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the recovered model.")],
    pope: Annotated[
        Path | None,
        typer.Option(help="POPE-like TSV to train on. Default: built-in questions on a toy world."),
    ] = None,
    scienceqa: Annotated[Path | None, typer.Option(help="Multiple-choice TSV to train on.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 400,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows per kind of question, process and step.")
    ] = 8,
    optimizer: Annotated[
        str, typer.Option(help="muon (hidden matrices; AdamW for the rest) or adamw.")
    ] = "muon",
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-3,
    muon_lr: Annotated[float, typer.Option(help="Peak learning rate of Muon.")] = 0.01,
    compression: Annotated[
        str, typer.Option(help="Compression of gradients between processes: lqsgd or none.")
    ] = "lqsgd",
    rank: Annotated[int, typer.Option(help="Largest rank of LQ-SGD's factors.")] = 4,
    bits: Annotated[int, typer.Option(help="Bits per value of LQ-SGD: 4 or 8.")] = 8,
    transport: Annotated[
        str, typer.Option(help="Transport of LQ-SGD: auto, all_gather or all_to_all.")
    ] = "auto",
    freeze_vision: Annotated[
        bool, typer.Option("--freeze-vision", help="Leave the vision tower as it is.")
    ] = False,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
    seed: Annotated[int, typer.Option(help="Random seed of data order and dropout.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a pruned model. An interrupted run goes on from its last checkpoint.

    Several processes compress their gradients with LQ-SGD. The checkpoints contain gradients of
    the training data.

    Examples:

    `hipp recover ./pruned -o ./recovered`

    `torchrun --nproc-per-node 2 -m hipp_ext recover ./pruned --pope POPE_train.tsv -o ./recovered`
    """
    from hipp_ext.recover import RecoverSettings, recover
    from hipp_ext.recover.processes import join_processes
    from hipp_ext.surgery.checkpoint import save_pruned

    position, workers = join_processes()
    require_model(model)
    require_new(out, overwrite)
    files = [file for file in (pope, scienceqa) if file]
    require_apart(out, Path(model_folder(model)), *files)
    chosen: Any = {"optimizer": optimizer, "compression": compression}
    settings = RecoverSettings(
        steps=steps,
        lr=lr,
        muon_lr=muon_lr,
        rank=rank,
        bits=bits,
        transport=transport,
        freeze_vision=freeze_vision,
        save_every=save_every,
        seed=seed,
        **chosen,
    )
    loaded, processor = load_model(model, device or (own_device() if workers > 1 else None), dtype)
    running = out.with_name(out.name + ".recover")
    if files:
        data = _question_data(processor, files, batch_size, seed, running, position)
    else:
        data = _testbed_data(processor, batch_size, seed, position)
    result = recover(loaded, data, settings, folder=running, progress=sys.stderr.isatty())
    if position == 0:
        save_pruned(loaded, out, processor, overwrite=overwrite)
        sent = ""
        if result.stats:
            stats = result.stats
            sent = f"; sent {stats['bytes_sent']:,} bytes, fp32 {stats['dense_bytes']:,}"
        typer.echo(
            f"{out}: loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f} in {steps} steps"
            f"{sent}; progress: {running}"
        )


def _testbed_data(processor: Any, rows: int, seed: int, position: int) -> Any:
    """The built-in questions, with a warning if the model is not the testbed's."""
    from hipp_ext.recover import TestbedData
    from hipp_ext.testbed.model import is_own_processor

    data = TestbedData(processor, seed, batch_size=rows)
    if position == 0 and not is_own_processor(processor):
        warn(
            "the built-in pictures and questions are a toy, to see that it runs; pass your own "
            "with --pope and --scienceqa."
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
