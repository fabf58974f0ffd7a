"""`hipp fit`: evaluated plans -> a trained planner."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from hipp_ext.cli import console, output
from hipp_ext.cli import options as opt
from hipp_ext.files import require_new
from hipp_ext.preference import Preference

fit_app = typer.Typer()


@fit_app.command()
def fit(
    model: console.ModelArgument,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the planner.")
    ],
    overwrite: console.Overwrite = False,
    cache: opt.Cache = None,
    steps: Annotated[
        int,
        opt.method_option(
            min=0, metavar="N", help="Policy updates, of 12 plans each; with --pruning-ratio of 4."
        ),
    ] = 20,
    mrs: Annotated[
        bool,
        opt.method_option(
            "--mrs", help="Also give the policy MRS: each group's sensitivity under attack."
        ),
    ] = False,
    attention_unit: opt.AttentionUnitOption = None,
    expert_unit: opt.ExpertUnitOption = None,
    partial: opt.PartialOption = "refuse",
    effort: opt.EffortOption = None,
    seed: Annotated[
        int,
        opt.method_option(
            metavar="N", help="Random seed of sampled preferences and exploration noise."
        ),
    ] = 0,
    towers: opt.TowersOption = None,
    pruning_ratio: opt.Ratio = None,
    round_to: opt.RoundTo = None,
    drop: opt.DropOption = None,
    shape: opt.ShapeOption = None,
    cost: Annotated[
        str,
        opt.size_option(
            metavar="NAME", help="What the compression objective counts: parameters or flops."
        ),
    ] = "parameters",
    pope: opt.Pope = None,
    scienceqa: opt.ScienceQA = None,
    references: opt.References = None,
    questions: opt.Questions = 192,
    robustness_on: opt.RobustnessOn = "pope",
    calibration: opt.CalibrationFiles = None,
    image_folder: opt.ImageFolder = None,
    calibration_rows: opt.CalibrationRows = None,
    sequence_length: opt.SequenceLength = None,
    device: console.Devices = None,
    dtype: console.Dtype = None,
) -> None:
    """Train a planner on measured plans.

    An interrupted fit resumes when the same command runs again. With several processes (torchrun)
    the plans are divided among the GPUs; `--device auto` spreads one large model over all GPUs.

    Examples:

    - `hipp fit testbed --out planner`
    - `hipp fit ./llava-1.5-7b-hf --pope POPE_train.tsv --scienceqa SQA_VAL.tsv --out planner`
    - `hipp fit ./llava-1.5-7b-hf --pope POPE_train.tsv --references captions.jsonl --out planner`
    - `torchrun --nproc-per-node 8 -m hipp_ext fit ./llava-1.5-7b-hf --out planner`
    """
    from hipp_ext.budget import Bounds
    from hipp_ext.planner import FitSettings, HiPPPlanner
    from hipp_ext.planner.cost import check_cost
    from hipp_ext.planner.evaluation import Workers
    from hipp_ext.scorers import MRS

    read_data = opt.read_calibration(
        calibration, image_folder, calibration_rows, sequence_length, references=references
    )
    asked = opt.QuestionFiles(
        pope=pope, scienceqa=scienceqa, references=references, image_folder=image_folder
    )
    check_cost(cost)
    pruned = opt.read_towers(towers) or ("language",)
    settings = FitSettings(steps=steps, seed=seed)
    workers = Workers.join()
    console.require_model(model)
    require_new(out, overwrite)
    if workers.count > 1 and device is None:
        device = console.own_device()
    loaded, processor = console.load_model(model, device, dtype, spread=True)
    evaluator = make_evaluator(loaded, processor, asked, questions, out, robustness_on, pruned)
    planner = HiPPPlanner(
        Preference(1, 1, 1),
        pruning_ratio=pruning_ratio,
        mrs=MRS() if mrs else None,
        bounds=Bounds(**opt.read_bounds(round_to, drop, shape)),
        attention_unit=attention_unit or "kv",
        expert_unit=expert_unit or "expert",
        partial=partial,
        effort=effort or "anchored",
        towers=pruned,
        cache=cache or True,
    )
    running = out.with_name(out.name + ".fit")
    result = planner.fit(
        loaded,
        evaluator,
        settings,
        folder=running,
        cost=cost,  # type: ignore[arg-type]
        processor=processor,
        calibration=read_data(loaded, processor),
        log=output.say if workers.leads else None,
        progress=workers.leads and output.shows_progress(),
    )
    if workers.leads:
        planner.history = replace(planner.history, command=console.command_line())
        planner.save(out, overwrite=overwrite)
        output.say(
            f"{out}: {result.evaluations} plans evaluated, hypervolume {result.hypervolume:.4f}. "
            f"Progress is kept in {running}."
        )
        output.next_command(
            output.shell("hipp", "front", out),
            output.shell("hipp", "plan", model, "--planner", out, "-o", "plan.json"),
        )


def make_evaluator(
    model: Any,
    processor: Any,
    files: opt.QuestionFiles,
    n: int,
    out: Path,
    robustness: opt.RobustnessTest,
    towers: Sequence[Any] = ("language",),
) -> Any:
    """The evaluator of plans: on the user's files, or on the testbed's questions.

    Args:
        model: the dense model.
        processor: its processor.
        files: the files; without a POPE-like one the testbed's questions are taken.
        n: questions per task.
        out: the planner's folder; pictures of the TSVs are unpacked beside it.
        robustness: what robustness is measured on.
        towers: towers that the plans prune.
    """
    from hipp_ext.evals.evaluator import Evaluator, search_evaluator
    from hipp_ext.evals.questions import read_questions
    from hipp_ext.evals.references import References
    from hipp_ext.testbed import is_testbed

    references: Any = ()
    if files.references is not None:
        references = References.from_file(
            files.references, processor, image_folder=files.image_folder, rows=n
        )
    if files.pope is None:
        if not is_testbed(model):
            output.warn(
                "plans are evaluated on the built-in questions about a toy world. Pass your own "
                "by --pope and --scienceqa."
            )
        options: Any = {"robustness": robustness, "references": references, "towers": towers}
        return search_evaluator(model, processor, n, **options)
    images = out.with_name(out.name + ".images")
    pope, choice = (
        read_questions(path, images, n) if path else [] for path in (files.pope, files.scienceqa)
    )
    return Evaluator(
        model, processor, pope, choice, references=references, robustness=robustness, towers=towers
    )
