"""`hipp demo | plan | fit | front | prune`: from a preference to a smaller model."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from hipp_ext.cli.console import (
    Devices,
    Dtype,
    ModelArgument,
    Overwrite,
    load_model,
    model_folder,
    own_device,
    require_apart,
    say,
    write_json,
)
from hipp_ext.errors import CheckpointError, DataError, PlanError, PreferenceError
from hipp_ext.files import require_new, require_new_file
from hipp_ext.preference import Preference

planning_app = typer.Typer()
Utility = Annotated[float | None, typer.Option("--utility", "-u", help="Weight of task accuracy.")]
Robustness = Annotated[
    float | None, typer.Option("--robustness", "-r", help="Weight of not hallucinating objects.")
]
Compression = Annotated[
    float | None, typer.Option("--compression", "-c", help="Weight of removing parameters.")
]
Ratio = Annotated[
    float | None,
    typer.Option(
        "--pruning-ratio",
        help="Share of parameters to remove; default: the planner's, if it has one; else the policy decides.",
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        help="Where measured signals are kept; default: ~/.cache/hipp-ext.",
        metavar="FOLDER",
    ),
]
Rows = Annotated[
    int | None,
    typer.Option(
        "--calibration-rows",
        min=2,
        help="Built-in questions to measure signals on; default: those of the planner, else 64.",
    ),
]
RoundTo = Annotated[
    int | None, typer.Option("--round-to", min=1, help="Keep widths that are multiples of this.")
]


@planning_app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Folder for everything the demo makes.")
    ] = Path("demo"),
    steps: Annotated[
        int, typer.Option(min=1, help="Policy updates of the fit, 12 plans each.")
    ] = 20,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Questions per data set in the final evaluation; default: all."),
    ] = None,
) -> None:
    """Fit, plan for three preferences, prune, evaluate with VLMEvalKit, and report; all on the testbed.

    Minutes on two cores; a second run resumes.

    Example: `hipp demo --out demo`
    """
    from hipp_ext.evals.demo import DemoSize, run_demo
    from hipp_ext.planner.fit import FitSettings

    run_demo(out, DemoSize(settings=FitSettings(steps=steps), limit=limit), say=typer.echo)


@planning_app.command()
def plan(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The plan file to write.")] = Path(
        "plan.json"
    ),
    utility: Utility = None,
    robustness: Robustness = None,
    compression: Compression = None,
    pruning_ratio: Ratio = None,
    round_to: RoundTo = None,
    planner: Annotated[
        Path | None,
        typer.Option("--planner", help="A folder written by `hipp fit`; default: untrained."),
    ] = None,
    archived: Annotated[
        bool,
        typer.Option(
            "--archived", help="The best plan that the fit evaluated, instead of the policy's."
        ),
    ] = False,
    rows: Rows = None,
    cache: Cache = None,
    device: Devices = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the pruning plan for a preference: 0.4, 0.4, 0.2 unless a weight is given; then the others count nothing.

    Only the proportions of the weights count; --pruning-ratio fixes the size. A language model is measured on the built-in
    questions that need no picture.

    Examples:

    `hipp plan ./llava-1.5-7b-hf -u 0.4 -r 0.4 -c 0.2 --round-to 64 -o plan.json`

    `hipp plan testbed --pruning-ratio 0.3 -r 1 -u 0 -c 0 --planner ./planner`

    `hipp plan testbed -u 0.2 -r 0.6 -c 0.2 --planner ./planner --archived`
    """
    from hipp_ext.budget import Bounds, check_ratio
    from hipp_ext.planner import HiPPPlanner
    from hipp_ext.planner.planner import UNFITTED
    from hipp_ext.planner.signal_cache import default_cache

    require_model(model)
    require_new_file(out, overwrite)
    wanted = _preference(utility, robustness, compression) or Preference(0.4, 0.4, 0.2)
    maker = HiPPPlanner.load(planner) if planner else HiPPPlanner(wanted)
    if pruning_ratio is not None:
        check_ratio(pruning_ratio)
        maker.pruning_ratio = pruning_ratio
    if archived and not len(maker.archive):
        raise PlanError(UNFITTED)
    maker.cache = cache or default_cache()
    if round_to is not None:
        maker.bounds = Bounds(round_to=round_to, min_keep=maker.bounds.min_keep)
    loaded, processor = load_model(model, device, dtype, spread=True)
    made = maker.plan(
        loaded,
        processor=processor,
        rows=rows,
        preference=wanted,
        archived=archived,
        say=say,
        progress=True,
    )
    made.save(out, overwrite)
    if pruning_ratio and pruning_ratio > (
        most := max((r.pruning_ratio for r in maker.archive.records), default=1.0)
    ):
        say(
            f"The fit evaluated no plan of more than {most:.2f}: how this one was allocated is extrapolated."
        )
    say(f"preference: {wanted}; {_removes(made, loaded)}")
    given = [weight for weight in (utility, robustness, compression) if weight is not None]
    if len(given) == 1 and maker.pruning_ratio is None:
        size = given[0] if 0 < given[0] < 1 else 0.3
        say(
            f"One weight was given, and only proportions count: to fix the size use --pruning-ratio {size:g}."
        )
    say(f"plan: {out}")
    _print_plan(made)


@planning_app.command()
def fit(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the planner.")],
    pope: Annotated[
        Path | None, typer.Option(help="POPE-like TSV to search on; default: the testbed's.")
    ] = None,
    scienceqa: Annotated[
        Path | None, typer.Option(help="Multiple-choice TSV to search on; default: the testbed's.")
    ] = None,
    questions: Annotated[
        int,
        typer.Option(
            min=1, help="Questions per task: few find the front, more tell like wishes apart."
        ),
    ] = 192,
    steps: Annotated[
        int, typer.Option(min=0, help="Policy updates, 12 plans each; 4 with --pruning-ratio.")
    ] = 20,
    pruning_ratio: Ratio = None,
    round_to: RoundTo = None,
    robustness: Annotated[
        str,
        typer.Option(
            help="What robustness is measured on: pope, adversarial (POPE on attacked pictures) or both."
        ),
    ] = "pope",
    mrs: Annotated[
        bool,
        typer.Option(
            "--mrs", help="Also show the policy MRS: how sensitive every group is under attack."
        ),
    ] = False,
    cost: Annotated[
        str, typer.Option(help="What compression is rewarded for: parameters, flops or latency.")
    ] = "parameters",
    scalarisation: Annotated[
        str,
        typer.Option(
            help="How objectives become one number: tchebycheff reaches every part of the front; or linear."
        ),
    ] = "tchebycheff",
    min_stability: Annotated[
        float | None,
        typer.Option(
            help="Do not measure plans that keep less synaptic flow [log]; default: measure all."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of preferences and noise.")] = 0,
    rows: Rows = None,
    cache: Cache = None,
    device: Devices = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Train the planner's policy by plan-level GRPO. Interrupted, it goes on from where it was.

    Examples:

    `hipp fit testbed --out planner`

    `hipp fit ./llava-1.5-7b-hf --pope POPE_train.tsv --scienceqa ScienceQA_VAL.tsv --out planner`

    `torchrun --nproc-per-node 8 -m hipp_ext fit ./llava-1.5-7b-hf ... --out planner` spreads the plans over 8 GPUs

    `hipp fit ./llava-v1.6-34b-hf ... --device auto --out planner` spreads one large model over all GPUs (needs accelerate)
    """
    from hipp_ext.budget import Bounds
    from hipp_ext.planner import FitSettings, HiPPPlanner
    from hipp_ext.planner.cost import check_cost
    from hipp_ext.planner.evaluation import Workers
    from hipp_ext.planner.signal_cache import default_cache
    from hipp_ext.scorers import MRS
    from hipp_ext.testbed import is_testbed

    check_cost(cost)
    ways: Any = {"scalarisation": scalarisation, "min_stability": min_stability}
    settings = FitSettings(steps=steps, seed=seed, **ways)
    workers = Workers.join()
    require_model(model)
    require_new(out, overwrite)
    _both_or_neither(pope, scienceqa)
    if workers.count > 1 and device is None:
        device = own_device()
    loaded, processor = load_model(model, device, dtype, spread=True)
    evaluator = _evaluator(loaded, processor, pope, scienceqa, questions, out, robustness)
    if workers.leads and pope is None and not is_testbed(loaded):
        warn(
            "the search is on the built-in questions, which are about a toy world: --pope and --scienceqa take others."
        )
    maker = HiPPPlanner(
        Preference(1, 1, 1),
        pruning_ratio=pruning_ratio,
        mrs=MRS() if mrs else None,
        bounds=Bounds(round_to=round_to or 1),
        cache=cache or default_cache(),
    )
    running = out.with_name(out.name + ".fit")
    tell = say if workers.leads else None
    chosen: Any = cost
    result = maker.fit(
        loaded,
        evaluator,
        settings,
        folder=running,
        cost=chosen,
        processor=processor,
        rows=rows,
        say=tell,
    )
    if workers.leads:
        maker.save(out, overwrite=overwrite)
        say(
            f"{out}: {result.evaluations} plans evaluated, hypervolume {result.hypervolume:.4f}; progress is kept in {running}"
        )


@planning_app.command()
def front(
    planner: Annotated[
        Path, typer.Argument(metavar="PLANNER", help="A folder written by `hipp fit`.")
    ],
    utility: Utility = None,
    robustness: Robustness = None,
    compression: Compression = None,
    pruning_ratio: Ratio = None,
    model: Annotated[
        str | None,
        typer.Option(help="The fitted model: measures the policy's plan where the fit did not."),
    ] = None,
    pope: Annotated[
        Path | None, typer.Option(help="The POPE-like TSV of the fit; default: the testbed's.")
    ] = None,
    scienceqa: Annotated[
        Path | None, typer.Option(help="The multiple-choice TSV of the fit.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="Questions per task, as in the fit.")] = 192,
    measured_on: Annotated[
        str,
        typer.Option(
            help="What the fit measured robustness on: pope, adversarial or both; its --robustness."
        ),
    ] = "pope",
    picture: Annotated[Path | None, typer.Option(help="Draw the front to this PNG.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the front to this file.")
    ] = None,
    device: Devices = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """The plans that no other evaluated plan dominates, with standard errors; and two answers to a preference.

    Examples:

    `hipp front planner --picture front.png`

    `hipp front planner -u 0.2 -r 0.6 -c 0.2 --model ./llava-1.5-7b-hf --pope POPE_train.tsv --scienceqa ScienceQA_VAL.tsv`
    """
    from hipp_ext.budget import check_ratio
    from hipp_ext.evals.front import answer, front_rows, print_front, write_picture
    from hipp_ext.planner import HiPPPlanner

    for file in (picture, json_file):
        if file is not None:
            require_new_file(file, overwrite)
    fitted = HiPPPlanner.load(planner)
    if pruning_ratio is not None:
        check_ratio(pruning_ratio)
        fitted.pruning_ratio = pruning_ratio
    choices, wanted = None, _preference(utility, robustness, compression)
    if wanted is None and (model or pruning_ratio is not None):
        raise PreferenceError(
            "--model and --pruning-ratio are for the answers to a preference: give -u, -r or -c as well."
        )
    if wanted is not None:
        loaded, processor = load_model(model, device, dtype, spread=True) if model else (None, None)
        evaluator = (
            _evaluator(loaded, processor, pope, scienceqa, questions, planner, measured_on)
            if model
            else None
        )
        choices = answer(fitted, wanted, loaded, evaluator)
    print_front(fitted, choices)
    if picture:
        write_picture(fitted, choices, picture)
    if json_file:
        write_json(json_file, {"front": front_rows(fitted)})


@planning_app.command()
def prune(
    model: ModelArgument,
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the small model.")],
    compensate: Annotated[
        bool,
        typer.Option(
            "--compensate",
            help="Fit what stays to calibration activations; no training, needs the processor.",
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="cpu, cuda, ..., auto (all GPUs); default: cpu; to compensate, the GPU if there is one.",
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Cut a model down to a plan and save it with its processor.

    Examples:

    `hipp prune ./llava-1.5-7b-hf plan.json -o ./pruned` then `vlmeval --data POPE --model ./pruned`

    `hipp prune ./llava-1.5-7b-hf plan.json -o ./compensated --compensate`
    """
    from hipp_ext.plan import PruningPlan
    from hipp_ext.surgery.checkpoint import save_pruned
    from hipp_ext.surgery.prune import prune as cut
    from hipp_ext.testbed import is_testbed

    require_model(model)
    made = PruningPlan.load(plan_file)
    require_new(out, overwrite)
    require_apart(out, Path(model_folder(model)), plan_file)
    loaded, processor = load_model(model, device if compensate or device else "cpu", spread=True)
    if compensate and not is_testbed(loaded):
        warn(
            "what stays is fitted to the built-in questions, which are about a toy world; from Python, "
            "prune(model, plan, reconstruct=True, calibration=batches) takes your own data."
        )
    before = sum(p.numel() for p in loaded.parameters())
    with _repairs_told():
        small = cut(loaded, made, inplace=True, reconstruct=compensate, processor=processor)
    save_pruned(small, out, processor, overwrite=overwrite)
    after = sum(p.numel() for p in small.parameters())
    say(
        f"{out}: {before / 1e6:.2f}M -> {after / 1e6:.2f}M parameters ({100 * (1 - after / before):.1f}% less in all)"
    )


def require_model(model: str) -> None:
    """Raise CheckpointError unless `model` is a model folder: said before anything else, for it may be a slip of the keys."""
    if not (folder := Path(model_folder(model)) / "config.json").is_file():
        raise CheckpointError(f"{folder.parent} is not a model folder: it has no config.json.")


@contextlib.contextmanager
def _repairs_told() -> Iterator[None]:
    """What compensation logs is told to the user: how many layers it repaired, and what it warns of."""
    log, teller = logging.getLogger("hipp_ext.surgery.reconstruct"), logging.Handler(logging.INFO)
    teller.emit = lambda record: say(record.getMessage())  # type: ignore[method-assign]
    level = log.level
    log.addHandler(teller)
    log.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: warn(str(message))
            yield
    finally:
        log.removeHandler(teller)
        log.setLevel(level)


def warn(line: str) -> None:
    """A line on stderr that does not end the command."""
    typer.secho(f"hipp: warning: {line}", fg="yellow", err=True)


def _removes(made: Any, model: Any) -> str:
    """What goes, in words."""
    prunable = sum(g.width * g.unit_parameters for g in made.groups)
    gone, weights = prunable - made.kept_parameters, list(model.parameters())
    share, size = gone / sum(p.numel() for p in weights), gone * weights[0].element_size() / 2**20
    return (
        f"removes {100 * made.pruning_ratio:.1f}% of the prunable parameters ({gone:,} of {prunable:,}), "
        f"{100 * share:.1f}% of all parameters, {size:.1f} MiB"
    )


def _preference(
    utility: float | None, robustness: float | None, compression: float | None
) -> Preference | None:
    """The wish; a weight that is not given counts nothing. None where none is."""
    if (utility, robustness, compression) == (None, None, None):
        return None
    return Preference(utility or 0.0, robustness or 0.0, compression or 0.0)


def _both_or_neither(pope: Path | None, scienceqa: Path | None) -> None:
    if (pope is None) != (scienceqa is None):
        raise DataError(
            "Give both --pope and --scienceqa, or neither (then the testbed's questions are used)."
        )


def _evaluator(
    model: Any,
    processor: Any,
    pope: Path | None,
    scienceqa: Path | None,
    n: int,
    out: Path,
    robustness: str = "pope",
) -> Any:
    from hipp_ext.evals.demo import search_evaluator
    from hipp_ext.evals.evaluator import Evaluator
    from hipp_ext.evals.questions import table_questions
    from hipp_ext.evals.tables import read_table

    _both_or_neither(pope, scienceqa)
    if pope is None or scienceqa is None:
        return search_evaluator(model, processor, n, robustness=robustness)
    images = out.with_name(out.name + ".images")
    tasks = [table_questions(read_table(path, images))[:n] for path in (pope, scienceqa)]
    return Evaluator(model, processor, *tasks, robustness=robustness)


def _print_plan(made: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("group", "keep", "of", "")
    for g in made.groups:
        table.add_row(g.name, str(g.keep), str(g.width), "█" * round(20 * g.keep / g.width))
    Console(markup=False).print(table)
