"""`hipp fit`: evaluated plans -> a trained planner."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hipp_ext.cli.calibration import (
    CalibrationFiles,
    CalibrationOptions,
    CalibrationRows,
    ImageFolder,
    SequenceLength,
)
from hipp_ext.cli.console import (
    Devices,
    Dtype,
    ModelArgument,
    Overwrite,
    load_model,
    own_device,
    require_model,
    warn,
)
from hipp_ext.cli.options import (
    METHOD,
    SIZE,
    Cache,
    DropOption,
    Pope,
    Questions,
    Ratio,
    RobustnessOn,
    RobustnessTest,
    RoundTo,
    ScienceQA,
    check_questions,
    read_bounds,
)
from hipp_ext.files import require_new
from hipp_ext.preference import Preference

fit_app = typer.Typer()


@fit_app.command()
def fit(
    model: ModelArgument,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the planner.")
    ],
    overwrite: Overwrite = False,
    cache: Cache = None,
    steps: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Policy updates, of 12 plans each; with --pruning-ratio of 4.",
            rich_help_panel=METHOD,
        ),
    ] = 20,
    mrs: Annotated[
        bool,
        typer.Option(
            "--mrs",
            help="Also give the policy MRS: each group's sensitivity under attack.",
            rich_help_panel=METHOD,
        ),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Random seed of sampled preferences and exploration noise.",
            rich_help_panel=METHOD,
        ),
    ] = 0,
    pruning_ratio: Ratio = None,
    round_to: RoundTo = None,
    drop: DropOption = None,
    cost: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What the compression objective counts: parameters or flops.",
            rich_help_panel=SIZE,
        ),
    ] = "parameters",
    pope: Pope = None,
    scienceqa: ScienceQA = None,
    questions: Questions = 192,
    robustness_on: RobustnessOn = "pope",
    calibration: CalibrationFiles = None,
    image_folder: ImageFolder = None,
    calibration_rows: CalibrationRows = None,
    sequence_length: SequenceLength = None,
    device: Devices = None,
    dtype: Dtype = None,
) -> None:
    """Train a planner on measured plans.

    An interrupted fit resumes when the same command runs again. With several processes (torchrun)
    the plans are divided among the GPUs; `--device auto` spreads one large model over all GPUs.

    Examples:

    - `hipp fit testbed --out planner`
    - `hipp fit ./llava-1.5-7b-hf --pope POPE_train.tsv --scienceqa SQA_VAL.tsv --out planner`
    - `torchrun --nproc-per-node 8 -m hipp_ext fit ./llava-1.5-7b-hf --out planner`
    """
    from hipp_ext.planner import FitSettings
    from hipp_ext.planner.cost import check_cost
    from hipp_ext.planner.evaluation import Workers

    data = CalibrationOptions(calibration, image_folder, calibration_rows, sequence_length)
    check_cost(cost)
    settings = FitSettings(steps=steps, seed=seed)
    workers = Workers.join()
    require_model(model)
    require_new(out, overwrite)
    check_questions(pope, scienceqa)
    if workers.count > 1 and device is None:
        device = own_device()
    loaded, processor = load_model(model, device, dtype, spread=True)
    evaluator = make_evaluator(loaded, processor, pope, scienceqa, questions, out, robustness_on)
    planner = _new_planner(pruning_ratio, mrs, read_bounds(round_to, drop), cache)
    running = out.with_name(out.name + ".fit")
    chosen: Any = cost
    result = planner.fit(
        loaded,
        evaluator,
        settings,
        folder=running,
        cost=chosen,
        processor=processor,
        calibration=data.read(loaded, processor),
        log=typer.echo if workers.leads else None,
    )
    if workers.leads:
        planner.save(out, overwrite=overwrite)
        typer.echo(
            f"{out}: {result.evaluations} plans evaluated, hypervolume {result.hypervolume:.4f}. "
            f"Progress is kept in {running}."
        )


def make_evaluator(
    model: Any,
    processor: Any,
    pope: Path | None,
    scienceqa: Path | None,
    n: int,
    out: Path,
    robustness: RobustnessTest,
) -> Any:
    """The evaluator of plans: on two files, or on the testbed's questions.

    Args:
        model: the dense model.
        processor: its processor.
        pope: POPE-like TSV; None: the testbed's.
        scienceqa: multiple-choice TSV; None: the testbed's.
        n: questions per task.
        out: the planner's folder; pictures of the TSVs are unpacked beside it.
        robustness: what robustness is measured on.
    """
    from hipp_ext.evals.evaluator import Evaluator, search_evaluator
    from hipp_ext.evals.questions import table_questions
    from hipp_ext.evals.tables import read_table
    from hipp_ext.testbed import is_testbed

    check_questions(pope, scienceqa)
    if pope is None or scienceqa is None:
        if not is_testbed(model):
            warn(
                "plans are evaluated on the built-in questions about a toy world. Pass your own "
                "by --pope and --scienceqa."
            )
        return search_evaluator(model, processor, n, robustness=robustness)
    images = out.with_name(out.name + ".images")
    tasks = [table_questions(read_table(path, images))[:n] for path in (pope, scienceqa)]
    return Evaluator(model, processor, *tasks, robustness=robustness)


def _new_planner(
    pruning_ratio: float | None, mrs: bool, bounds: dict[str, Any], cache: Path | None
) -> Any:
    from hipp_ext.budget import Bounds
    from hipp_ext.planner import HiPPPlanner
    from hipp_ext.scorers import MRS

    return HiPPPlanner(
        Preference(1, 1, 1),
        pruning_ratio=pruning_ratio,
        mrs=MRS() if mrs else None,
        bounds=Bounds(**bounds),
        cache=cache or True,
    )
