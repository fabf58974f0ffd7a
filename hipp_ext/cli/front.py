"""`hipp front`: the Pareto front of a fitted planner."""

from pathlib import Path
from typing import Annotated

import typer

from hipp_ext.cli import options as opt
from hipp_ext.cli import output
from hipp_ext.cli.console import Devices, Dtype, Overwrite, load_model
from hipp_ext.cli.fit import make_evaluator
from hipp_ext.errors import PreferenceError
from hipp_ext.files import require_new_file

front_app = typer.Typer()


@front_app.command()
def front(
    planner: Annotated[
        Path, typer.Argument(metavar="PLANNER", help="Folder that `hipp fit` wrote.")
    ],
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the front to this PNG file. Default: no picture."),
    ] = None,
    as_json: output.Json = False,
    overwrite: Overwrite = False,
    utility: opt.Utility = None,
    robustness: opt.Robustness = None,
    compression: opt.Compression = None,
    pruning_ratio: opt.Ratio = None,
    model: Annotated[
        str | None,
        opt.question_option(
            metavar="FOLDER",
            help="The fitted model. Measures the policy's plan if the fit did not evaluate it. "
            "Give the questions of the fit as well. Default: do not measure.",
        ),
    ] = None,
    pope: opt.Pope = None,
    scienceqa: opt.ScienceQA = None,
    references: opt.References = None,
    image_folder: opt.ImageFolder = None,
    questions: opt.Questions = 192,
    robustness_on: opt.RobustnessOn = "pope",
    device: Devices = None,
    dtype: Dtype = None,
) -> None:
    """Show the Pareto front of a fitted planner.

    With -u, -r or -c also the policy's plan and the best evaluated plan for that preference.

    Examples:

    - `hipp front planner --picture front.png`
    - `hipp front planner -u 0.2 -r 0.6 -c 0.2`
    - `hipp front planner -u 1 --model ./llava-1.5-7b-hf --pope POPE.tsv --scienceqa SQA.tsv`
    """
    from hipp_ext.budget import check_ratio
    from hipp_ext.evals.drawing import draw_front
    from hipp_ext.evals.front import answer, front_rows, print_front
    from hipp_ext.planner import HiPPPlanner

    asked = opt.QuestionFiles(
        pope=pope, scienceqa=scienceqa, references=references, image_folder=image_folder
    )
    if picture is not None:
        require_new_file(picture, overwrite)
    fitted = HiPPPlanner.load(planner)
    if pruning_ratio is not None:
        check_ratio(pruning_ratio)
        fitted.pruning_ratio = pruning_ratio
    answers, preference = None, opt.read_preference(utility, robustness, compression)
    if preference is None and (model or pruning_ratio is not None):
        raise PreferenceError("--model and --pruning-ratio need a preference: give -u, -r or -c.")
    if preference is not None:
        loaded, evaluator = None, None
        if model:
            loaded, processor = load_model(model, device, dtype, spread=True)
            evaluator = make_evaluator(
                loaded, processor, asked, questions, planner, robustness_on, fitted.towers
            )
        answers = answer(fitted, preference, loaded, evaluator)
    if picture:
        draw_front(fitted, answers).save(picture)
    if as_json:
        output.print_json({"front": front_rows(fitted)})
        return
    print_front(fitted, answers)
