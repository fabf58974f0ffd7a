"""Command line of the small world: its pictures, a vision tower, and a language model that sees."""

from pathlib import Path
from typing import Annotated

import typer

from hipp_ext.errors import DataError
from hipp_ext.evals.studies.measuring import Save, report, run_command
from hipp_ext.evals.studies.smolworld.factors import COMMITTED
from hipp_ext.evals.studies.smolworld.packages import MODEL
from hipp_ext.evals.studies.smolworld.questions.command import questions
from hipp_ext.evals.studies.smolworld.scenes import read_world
from hipp_ext.evals.studies.smolworld.table.command import Concepts, Out, table

Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps.")]
Lr = Annotated[float, typer.Option(min=0, help="Peak learning rate.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
N = Annotated[int | None, typer.Option(min=1, help="Questions per task. Default: all.")]


def scenes(
    out: Annotated[Path, typer.Option(help="Folder of the tables.")] = Path("smolworld/data"),
    concepts: Concepts = None,
    n: N = None,
    overwrite: Annotated[bool, typer.Option(help="Replace tables of another world.")] = False,
) -> None:
    """Write the questions of all splits as VLMEvalKit's tables, and a sheet of their pictures."""
    from hipp_ext.evals.studies.smolworld.export import export, write_sheets

    world = read_world(concepts)
    for path in export(world, out, n, overwrite=overwrite):
        typer.echo(path)
    write_sheets(world, out)


def vision(
    out: Out = Path("smolworld"),
    concepts: Concepts = None,
    steps: Steps = 3000,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per step and process.")] = 64,
    lr: Lr = 1e-3,
    seed: Seed = 0,
) -> None:
    """Train the vision tower and the projector to name what each patch shows.

    OUT/tower.safetensors gets both, and OUT/vision.json says how well drawings are named that were
    trained on (calibration), and that were not (validation).

    `OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m hipp_ext.evals.studies.smolworld vision
    --batch-size 32`
    """
    from hipp_ext.evals.studies.smolworld.model import build_base
    from hipp_ext.evals.studies.smolworld.namer import Namer, naming
    from hipp_ext.evals.studies.smolworld.vision import train_vision, vision_settings
    from hipp_ext.recover.processes import join_processes

    world = read_world(concepts)
    model, processor = build_base(seed)
    settings = vision_settings(steps, lr=lr, seed=seed)
    position, _ = join_processes()
    result = train_vision(model, processor, world, out, settings, batch_size)
    if position:
        return
    namer = Namer(model, processor, world)
    found = {split: naming(namer, world, split) for split in ("calibration", "validation")}
    values = {"steps": steps, "batch_size": batch_size, "losses": result.losses[-5:], **found}
    report("smolworld_vision", values, False, out=out / "vision.json")


def train(
    out: Out = Path("smolworld"),
    concepts: Concepts = None,
    steps: Steps = 1000,
    first_steps: Annotated[
        int, typer.Option(min=0, help="First steps, of captions and of choices that copy.")
    ] = 100,
    lr: Lr = 1.5e-3,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    with_vision: Annotated[
        bool, typer.Option("--with-vision", help="Train the vision tower, too.")
    ] = False,
    seed: Seed = 0,
) -> None:
    """Train adapters on SmolLM2, and the projector, from OUT/tower.safetensors or the repository's.

    A step has 16 conversations, which 1, 2 or 4 processes of `torchrun` share.
    OUT/factors.safetensors gets projector and adapters.
    """
    from hipp_ext.evals.studies.smolworld.conversations import PER_STEP, Conversations
    from hipp_ext.evals.studies.smolworld.factors import add_factors, tower_of
    from hipp_ext.evals.studies.smolworld.model import build_base
    from hipp_ext.evals.studies.smolworld.training import language_settings, train_language
    from hipp_ext.recover.processes import join_processes

    position, workers = join_processes()
    if any(count % workers for count in PER_STEP):
        raise DataError(f"{workers} processes cannot share {PER_STEP} conversations of a step.")
    world = read_world(concepts)
    model, processor = build_base(seed)
    add_factors(model, tower_of(out))
    captions, looks, choices = (count // workers for count in PER_STEP)
    data = Conversations(
        world, processor, (captions, looks, choices), first_steps=first_steps, seed=seed
    )
    settings = language_settings(steps, lr=lr, rank=rank, vision=with_vision, seed=seed)
    result = train_language(model, data, settings, out)
    if not position:
        typer.echo(f"loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f} in {steps} steps")


def build(
    out: Annotated[
        Path, typer.Option(help="Folder of the model.", show_default=".smolworld/model")
    ] = MODEL,
    trained: Annotated[
        Path, typer.Option(help="Folder of `train`.", show_default="the weights of the repository")
    ] = COMMITTED,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing folder.")] = False,
) -> None:
    """Build the model's folder from what was trained, and the package of SmolLM2."""
    from hipp_ext.evals.studies.smolworld.factors import build_model
    from hipp_ext.evals.studies.smolworld.model import save

    model, processor = build_model(trained)
    save(model, processor, out, overwrite=overwrite)
    typer.echo(out)


def evaluate(
    model: Annotated[
        Path,
        typer.Argument(
            help="Folder of the model, dense or pruned.", show_default=".smolworld/model"
        ),
    ] = MODEL,
    split: Annotated[str, typer.Option(help="Split; claims are made on test.")] = "validation",
    concepts: Concepts = None,
    n: N = None,
    out: Annotated[Path | None, typer.Option(help="JSON file of the result.")] = None,
    save: Save = False,
) -> None:
    """Measure POPE by split, multiple choice by relation, and CHAIR of captions."""
    from hipp_ext import load_pruned
    from hipp_ext.calibration import find_processor
    from hipp_ext.evals.studies.smolworld import evaluation

    world = read_world(concepts)
    loaded = load_pruned(model)
    found = evaluation.evaluate(loaded, find_processor(loaded), world, split, n)
    report("smolworld", found, save, out=out)


def run(
    out: Out = Path("smolworld"),
    concepts: Concepts = None,
    vision_steps: Annotated[int, typer.Option(min=1, help="Steps of the tower.")] = 3000,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the language model.")] = 1000,
    n: N = None,
    seed: Seed = 0,
    save: Save = False,
) -> None:
    """Train, build and measure on the validation split: all commands one after the other.

    Repeat it after an interruption: what was done is not done again.

    `python -m hipp_ext.evals.studies.smolworld run --out smolworld`
    """
    vision(out, concepts, vision_steps, seed=seed)
    train(out, concepts, steps, min(100, steps // 10), seed=seed)
    build(out / "model", out, overwrite=True)
    evaluate(out / "model", "validation", concepts, n, out / "validation.json", save)


if __name__ == "__main__":
    run_command(scenes, vision, train, build, evaluate, run, table, questions)
