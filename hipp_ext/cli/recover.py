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
    say,
    warn,
)
from hipp_ext.errors import DataError
from hipp_ext.files import require_new

recover_app = typer.Typer()


@recover_app.command("recover")
def recover_command(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the recovered model.")],
    pope: Annotated[
        Path | None,
        typer.Option(
            help="POPE-like TSV to train on; default: the built-in questions, which are a toy."
        ),
    ] = None,
    scienceqa: Annotated[Path | None, typer.Option(help="Multiple-choice TSV to train on.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 400,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows per kind of question, process and step.")
    ] = 8,
    optimizer: Annotated[
        str, typer.Option(help="muon (hidden matrices; AdamW for the rest) or adamw.")
    ] = "muon",
    rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-3,
    muon_rate: Annotated[float, typer.Option(help="Peak learning rate of Muon.")] = 0.01,
    compression: Annotated[
        str, typer.Option(help="Of gradients between processes: lqsgd or none.")
    ] = "lqsgd",
    rank: Annotated[int, typer.Option(help="Of LQ-SGD's factors.")] = 4,
    bits: Annotated[int, typer.Option(help="Of LQ-SGD's values, 1 to 8.")] = 8,
    transport: Annotated[str, typer.Option(help="auto, all_gather or all_to_all.")] = "auto",
    freeze_vision: Annotated[
        bool, typer.Option("--freeze-vision", help="Leave the vision tower as it is.")
    ] = False,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
    seed: Annotated[int, typer.Option(help="Of data order and dropout.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a pruned model back to what it knew. Interrupted, it goes on from its last checkpoint.

    With several processes, gradients go compressed by LQ-SGD. Its memory, in the checkpoints, is made of the data's gradients.

    Examples:

    `hipp recover ./pruned -o ./recovered`

    `torchrun --nproc-per-node 2 -m hipp_ext recover ./pruned --pope POPE_train.tsv --scienceqa SQA_train.tsv -o ./recovered`
    """
    from hipp_ext.recover import RecoverSettings, TestbedLessons, recover
    from hipp_ext.recover.training import join_processes
    from hipp_ext.surgery.checkpoint import save_pruned
    from hipp_ext.testbed.model import is_own_processor

    position, workers = join_processes()
    require_model(model)
    require_new(out, overwrite)
    require_apart(out, Path(model_folder(model)), *(p for p in (pope, scienceqa) if p))
    chosen: Any = {"optimizer": optimizer, "compression": compression}
    settings = RecoverSettings(
        steps=steps,
        rate=rate,
        muon_rate=muon_rate,
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
    if pope is None and scienceqa is None:
        lessons: Any = TestbedLessons(processor, seed, batch_size=batch_size)
        if position == 0 and not is_own_processor(processor):
            warn(
                "the built-in pictures and questions are a toy, to see that it runs: --pope and --scienceqa take others."
            )
    else:
        lessons = _question_lessons(
            processor, [p for p in (pope, scienceqa) if p], batch_size, seed, running, position
        )
    result = recover(loaded, lessons, settings, folder=running, progress=sys.stderr.isatty())
    if position == 0:
        save_pruned(loaded, out, processor, overwrite=overwrite)
        sent = (
            result.stats
            and f"; sent {result.stats['bytes_sent']:,} bytes, fp32 {result.stats['dense_bytes']:,}"
        )
        say(
            f"{out}: loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f} in {steps} steps{sent or ''}; progress: {running}"
        )


def _question_lessons(
    processor: Any, files: list[Path], rows: int, seed: int, running: Path, position: int
) -> Any:
    """TSVs to train on. The published test sets are not among them."""
    from hipp_ext.evals.questions import table_questions
    from hipp_ext.evals.tables import KNOWN, read_table
    from hipp_ext.recover import QuestionLessons

    tasks = []
    for file in files:
        table = read_table(
            file, running / f"images.{position}", name=file.stem if file.stem in KNOWN else None
        )
        if table.official and file.stem != "ScienceQA_VAL":
            raise DataError(
                f"{file} is the published {file.stem}, a test set: train on other questions."
            )
        tasks.append(table_questions(table))
    return QuestionLessons(processor, tasks, rows, seed)
