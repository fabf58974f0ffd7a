"""`hipp shrink`: rounds of pruning and recovery, in one folder."""

import copy
import functools
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from hipp_ext.cli import options as opt
from hipp_ext.cli import output
from hipp_ext.cli import recover_options as options
from hipp_ext.cli.console import (
    Device,
    Dtype,
    ModelArgument,
    load_model,
    model_folder,
    own_device,
    require_apart,
    require_model,
    require_run,
)
from hipp_ext.cli.plan import require_served
from hipp_ext.cli.prune import served
from hipp_ext.cli.recover import file_data
from hipp_ext.cli.teacher import TeacherOptions
from hipp_ext.errors import CalibrationError, PlanError

shrink_app = typer.Typer()
RECOVERY = ("Teacher", "Training", "Processes")  # panels of options of `hipp recover`
_round = functools.partial(typer.Option, show_default=False, rich_help_panel="Rounds")


class ShortHelp(TyperCommand):
    """A command whose help leaves out what the help of `hipp recover` explains."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        shown = copy.copy(self)
        shown.params = [
            p
            for p in self.params
            if getattr(p, "rich_help_panel", None) not in RECOVERY or p.name == "teacher"
        ]
        TyperCommand.format_help(shown, ctx, formatter)


@shrink_app.command("shrink", cls=ShortHelp)
def shrink_command(
    model: ModelArgument,
    data: Annotated[
        Path, typer.Option(metavar="FILE", help="Chats, questions or texts to learn from.")
    ],
    to: Annotated[
        float,
        typer.Option(metavar="R", help="Fraction of the prunable parameters to remove in all."),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FOLDER", help="Folder for all rounds and the report."),
    ],
    steps: Annotated[int, _round(min=1, metavar="N", help="Number of rounds. Default: 4.")] = 4,
    spacing: Annotated[
        Literal["geometric", "linear"],
        _round(
            metavar="NAME",
            help="geometric (equal fractions of what is left) or linear. Default: geometric.",
        ),
    ] = "geometric",
    no_reconstruct: Annotated[
        bool, _round("--no-reconstruct", help="Do not begin recoveries with a least-squares fit.")
    ] = False,
    recover_steps: Annotated[
        int, _round(min=1, metavar="N", help="Optimizer steps of a round. Default: 400.")
    ] = 400,
    last_recover_steps: Annotated[
        int | None,
        _round(min=1, metavar="N", help="Those of the last round. Default: --recover-steps."),
    ] = None,
    only_last: Annotated[
        bool, _round("--only-last", help="Remove the model of a round when the next is complete.")
    ] = False,
    utility: opt.Utility = None,
    robustness: opt.Robustness = None,
    towers: opt.TowersOption = None,
    round_to: opt.RoundTo = None,
    drop: opt.DropOption = None,
    shape: opt.ShapeOption = None,
    serve: opt.ServeOption = "any",
    scorer: opt.ScorerOption = None,
    allocator: opt.AllocatorOption = "planner",
    attention_unit: opt.AttentionUnitOption = None,
    expert_unit: opt.ExpertUnitOption = None,
    partial: opt.PartialOption = "refuse",
    effort: opt.EffortOption = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel="Calibration",
            metavar="FILE",
            help="Data for planning and reconstruction; or twice, as utility=FILE and "
            "robustness=FILE. Default: 128 rows of --data that are trained on.",
        ),
    ] = None,
    calibration_rows: Annotated[
        int | None,
        typer.Option(
            rich_help_panel="Calibration", min=2, metavar="N", help="Rows of FILE. Default: 128."
        ),
    ] = None,
    image_folder: options.ImageFolder = None,
    sequence_length: options.SequenceLength = None,
    packed: options.Packed = False,
    holdout: Annotated[
        float,
        typer.Option(
            rich_help_panel="Data",
            show_default=False,
            metavar="F",
            help="Fraction evaluated instead of trained on. Default: 0.02.",
        ),
    ] = 0.02,
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
    as_json: output.Json = False,
) -> None:
    """Prune a model in rounds, each of which recovers by learning from the dense model.

    Every round leaves a complete model folder: OUT/round-1, OUT/round-2, ... An interrupted run
    goes on when the same command is repeated. OUT/shrink.json and shrink.png say what was lost and
    what came back. The options of `hipp recover` on teacher, training and processes are taken, too.

    Examples:

    `hipp shrink ./model --to 0.5 --steps 4 --data chats.jsonl -o ./small`

    `hipp shrink ./model --to 0.4 --data chats.jsonl --serve stock --teacher ./teacher -o ./small`
    """
    given = options.with_recipe(dict(locals()))
    output.only_json(as_json)
    from hipp_ext.recover import RecoverSettings
    from hipp_ext.recover.processes import join_processes
    from hipp_ext.shrink import ShrinkSettings, shrink
    from hipp_ext.shrink.report import REPORT

    own = {f.name: given[f.name] for f in fields(RecoverSettings) if f.name in given}
    own["steps"] = recover_steps
    settings = ShrinkSettings(
        to=to,
        steps=steps,
        spacing=spacing,
        reconstruct=not no_reconstruct,
        recover=RecoverSettings(**own),
        last_steps=last_recover_steps,
        only_last=only_last,
    )
    planner = _planner(given)
    if calibration_rows and not calibration:
        raise CalibrationError("--calibration-rows is for --calibration FILE: give it as well.")
    folder_of_pictures, length = (image_folder, sequence_length) if calibration else (None, None)
    read_data = opt.read_calibration(calibration, folder_of_pictures, calibration_rows, length)
    position, workers = join_processes()
    require_model(model)
    asked = TeacherOptions(folder=teacher, device=teacher_device, dtype=teacher_dtype)
    if position == 0:
        require_run(out)
    require_apart(out, Path(model_folder(model)), *(file for file in (data, teacher) if file))
    place = device or (own_device() if workers > 1 else None)
    loaded, processor = load_model(model, place, dtype)
    if serve in ("vllm", "gguf"):
        require_served(loaded, serve)
    batches = read_data(loaded, processor) if calibration else None
    models = [loaded]
    del loaded  # so that it leaves the memory after the first round, if it is not the teacher
    report = shrink(
        models.pop(),
        file_data(data, processor, given),
        settings,
        folder=out,
        teacher=asked.load(place),
        planner=planner,
        calibration=batches,
        processor=processor,
        progress=output.shows_progress(),
        log=lambda line: typer.echo(line, err=True) if output.shows_progress() else None,
    )
    if position == 0:
        _print_report(report, out)
        if as_json:
            output.print_report(out / REPORT)


def _planner(given: dict[str, Any]) -> Any:
    """The planner or allocator that the options describe.

    Raises:
        PlanError: options exclude each other.
    """
    from hipp_ext.budget import Bounds
    from hipp_ext.planner import HiPPPlanner

    preference = opt.read_preference(given["utility"], given["robustness"], None)
    bounds = opt.read_bounds(*(given[name] for name in ("round_to", "drop", "shape", "serve")))
    chosen = {name: given[name] for name in ("attention_unit", "expert_unit", "partial", "effort")}
    chosen["towers"] = opt.read_towers(given["towers"])
    chosen["scorer"] = opt.registered("scorer", given["scorer"])() if given["scorer"] else None
    chosen = {name: value for name, value in chosen.items() if value is not None}
    name = given["allocator"]
    if name == "planner":
        wanted = preference or opt.DEFAULT_PREFERENCE
        return HiPPPlanner(wanted, bounds=Bounds(**bounds), **chosen)
    if preference is not None:
        raise PlanError(f"--allocator {name} and a preference exclude each other: omit one.")
    if given["effort"] and name != "sensitivity":
        raise PlanError(
            f"--allocator {name} and --effort exclude each other: only the planner and "
            "sensitivity measure the groups."
        )
    kind = opt.registered("allocator", name)
    return kind(pruning_ratio=0.0, bounds=Bounds(**bounds), **chosen)


def _print_report(report: Any, out: Path) -> None:
    from rich.table import Table

    from hipp_ext.evals.text_table import print_table
    from hipp_ext.integrations.serving import check_serving

    name = "kl" if all("kl" in r.before for r in report.rounds) else "loss"
    table = Table("round", "asked", "removed", "parameters", f"{name}: pruned", "recovered", "min")
    for r in report.rounds:
        losses = [f"{found[name]:.4g}" if name in found else "-" for found in (r.before, r.after)]
        table.add_row(
            r.folder,
            f"{r.ratio_asked:.1%}",
            f"{r.ratio:.1%}",
            f"{r.parameters / 1e6:.2f}M",
            *losses,
            f"{r.minutes.total:.1f}",
        )
    if output.speaks():
        print_table(table)
    if lost := [r for r in report.rounds if r.skipped]:
        output.warn(
            f"up to {max(r.skipped for r in lost)} rows of the data could not be used in a round: "
            f"{out / lost[0].folder}.work/recover/recover.json names them."
        )
    last = report.rounds[-1]
    output.say(
        f"{out / last.folder}: {report.start_parameters / 1e6:.2f}M -> "
        f"{last.parameters / 1e6:.2f}M parameters; report: {out / 'shrink.json'}, "
        f"{out / 'shrink.png'}"
    )
    folder = out / last.folder
    output.say(served(folder, check_serving(folder)))
    output.next_command(output.shell("hipp", "check-serving", folder))
