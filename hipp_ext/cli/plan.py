"""`hipp plan`: a model and a preference, or an allocator -> a plan file."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hipp_ext.cli import options as opt
from hipp_ext.cli import output
from hipp_ext.cli.console import (
    Devices,
    Dtype,
    ModelArgument,
    Overwrite,
    command_line,
    load_model,
    require_model,
)
from hipp_ext.cli.plan_estimate import say_estimate
from hipp_ext.errors import PlanError
from hipp_ext.files import require_new_file
from hipp_ext.preference import Preference

plan_app = typer.Typer()


@plan_app.command()
def plan(
    model: ModelArgument,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            show_default=False,
            help="The plan file to write. Default: plan.json.",
        ),
    ] = Path("plan.json"),
    overwrite: Overwrite = False,
    cache: opt.Cache = None,
    utility: opt.Utility = None,
    robustness: opt.Robustness = None,
    compression: opt.Compression = None,
    towers: opt.TowersOption = None,
    pruning_ratio: opt.Ratio = None,
    round_to: opt.RoundTo = None,
    drop: opt.DropOption = None,
    shape: opt.ShapeOption = None,
    serve: opt.ServeOption = "any",
    cost: opt.CostOption = "parameters",
    max_memory_mb: opt.MaxMemory = None,
    max_latency_ms: opt.MaxLatency = None,
    latency_from: opt.LatencyFrom = None,
    latency_of: opt.LatencyOf = "decode",
    planner: Annotated[
        Path | None,
        opt.method_option(
            metavar="FOLDER", help="Planner that `hipp fit` wrote. Default: untrained."
        ),
    ] = None,
    best_evaluated: Annotated[
        bool,
        opt.method_option(
            "--best-evaluated", help="Take the best plan that the fit evaluated, not the policy's."
        ),
    ] = False,
    scorer: opt.ScorerOption = None,
    allocator: opt.AllocatorOption = "planner",
    attention_unit: opt.AttentionUnitOption = None,
    expert_unit: opt.ExpertUnitOption = None,
    partial: opt.PartialOption = "refuse",
    effort: opt.EffortOption = None,
    calibration: opt.CalibrationFiles = None,
    image_folder: opt.ImageFolder = None,
    calibration_rows: opt.CalibrationRows = None,
    sequence_length: opt.SequenceLength = None,
    device: Devices = None,
    dtype: Dtype = None,
    as_json: output.Json = False,
) -> None:
    """Create a pruning plan.

    Weights default to utility 0.4, robustness 0.4, compression 0.2; if you give any weight, those
    you omit are 0. Only their proportions count: `--pruning-ratio` fixes the size.

    Examples:

    - `hipp plan ./llava-1.5-7b-hf -u 0.4 -r 0.4 -c 0.2 --round-to 64 -o plan.json`
    - `hipp plan ./Qwen3-8B --pruning-ratio 0.3 --allocator owl --calibration chats.jsonl`
    - `hipp plan testbed -u 0.2 -r 0.6 -c 0.2 --planner ./planner --best-evaluated`
    - `hipp plan ./llava-1.5-7b-hf --serve stock --max-memory-mb 10000`
    - `hipp plan ./llava-1.5-7b-hf --towers language,vision,projector --pruning-ratio 0.3`
    """
    output.only_json(as_json)
    from hipp_ext.budget import Bounds
    from hipp_ext.groups import left_whole_lines
    from hipp_ext.planner import HiPPPlanner
    from hipp_ext.sensitivity.cached import default_cache

    read_data = opt.read_calibration(calibration, image_folder, calibration_rows, sequence_length)
    asked = opt.read_towers(towers)
    weights = (utility, robustness, compression)
    preference = opt.read_preference(*weights)
    require_model(model)
    require_new_file(out, overwrite)
    limits, ratio = opt.read_limits(
        max_memory_mb, max_latency_ms, latency_from, latency_of, cost, pruning_ratio
    )
    limited = max_memory_mb is not None or limits.max_latency_ms is not None
    bounds = opt.read_bounds(round_to, drop, shape, serve)
    ranking = opt.registered("scorer", scorer)() if scorer else None
    if allocator == "planner":
        preference = preference or opt.DEFAULT_PREFERENCE
        maker: Any = HiPPPlanner(preference, scorer=ranking)
        if planner:
            maker = HiPPPlanner.load(planner, scorer=ranking)
        maker.pruning_ratio = maker.pruning_ratio if ratio is None else ratio
        maker.bounds = dataclasses.replace(maker.bounds, **bounds)
        maker.cache = cache or maker.cache
        maker.attention_unit = attention_unit or maker.attention_unit
        maker.expert_unit = expert_unit or maker.expert_unit
        maker.effort = effort or maker.effort
        maker.towers = asked or maker.towers
        maker.partial = partial if partial != "refuse" else maker.partial
        if best_evaluated and not len(maker.archive):
            raise PlanError(
                "--best-evaluated needs a fitted planner: pass its folder by --planner."
            )
        options: dict[str, Any] = {"preference": preference, "best_evaluated": best_evaluated}
        options |= {"log": output.say}
    else:
        for name, given in {
            "a preference": preference,
            "--planner": planner,
            "--best-evaluated": best_evaluated,
            "--cache": cache if allocator != "sensitivity" else None,
        }.items():
            if given:
                raise PlanError(
                    f"--allocator {allocator} and {name} exclude each other: omit one of them."
                )
        kind, options = opt.registered("allocator", allocator), {}
        if ratio is None and not limited:
            raise PlanError(
                f"--allocator {allocator} needs --pruning-ratio or a limit: only the planner can "
                "choose the ratio."
            )
        chosen = {"effort": effort} if effort else {}
        if chosen and allocator != "sensitivity":
            raise PlanError(
                f"--allocator {allocator} and --effort exclude each other: only the planner and "
                "sensitivity measure the groups."
            )
        chosen |= {"attention_unit": attention_unit} if attention_unit else {}
        chosen |= {"expert_unit": expert_unit} if expert_unit else {}
        chosen |= {"partial": partial}
        chosen |= {"towers": asked} if asked else {}
        chosen |= {"cache": cache or default_cache()} if allocator == "sensitivity" else {}
        maker = kind(pruning_ratio=ratio or 0.0, scorer=ranking, bounds=Bounds(**bounds), **chosen)
    loaded, processor = load_model(model, device, dtype, spread=True)
    if serve in ("vllm", "gguf"):
        require_served(loaded, serve)
    options |= {"calibration": read_data(loaded, processor), "limits": limits}
    options |= {"announce": functools.partial(say_estimate, loaded)}
    made = maker.plan(loaded, processor=processor, progress=output.shows_progress(), **options)
    made = made.after(*_fit_command(maker), command_line())
    made.save(out, overwrite)
    notes = list(_notes(maker, weights, ratio, preference))
    left = left_whole_lines(made.left_whole)
    given = [word for file in calibration or () for word in ("--calibration", file)]
    given += ["--image-folder", str(image_folder)] if image_folder else []
    fitting = ("--reconstruct", *given) if given else ()
    then = output.shell("hipp", "prune", model, out, *fitting, "-o", "pruned")
    if as_json:
        output.print_json(
            {"plan": str(out), **_removed(made, loaded), "notes": notes, "left_whole": left}
            | {"next": then}
        )
        return
    for line in (*notes, f"{out}: {_removes(made, loaded)}", *_active(made, loaded)):
        output.say(line)
    for line in left:
        output.say(f"left whole: {line}")
    if output.speaks():
        _print_plan(made)
    output.next_command(then)


def _fit_command(maker: Any) -> list[str]:
    """The command that fitted the planner, if one did."""
    history = getattr(maker, "history", None)
    return [history.command] if history is not None and history.command else []


def require_served(model: Any, serve: str) -> None:
    """Raise PlanError where the runtime could not serve the model with uneven layers."""
    from hipp_ext.integrations.serving import pruned_refusals

    if reasons := pruned_refusals(model.config, serve):  # type: ignore[arg-type]
        raise PlanError(
            f"--serve {serve}: {'; '.join(reasons)}. Take --serve stock, or leave --serve out."
        )


def _notes(
    maker: Any,
    weights: Sequence[float | None],
    pruning_ratio: float | None,
    preference: Preference | None,
) -> Iterator[str]:
    """What the user should know about the planner's answer to a preference."""
    if preference is None:
        return
    yield f"preference: {preference}"
    largest = max((r.pruning_ratio for r in maker.archive.records), default=1.0)
    if pruning_ratio and pruning_ratio > largest:
        yield (
            f"The fit evaluated no plan that removes more than {largest:.2f}: the allocation is "
            "extrapolated."
        )
    given = [weight for weight in weights if weight is not None]
    if len(given) == 1 and maker.pruning_ratio is None:
        size = given[0] if 0 < given[0] < 1 else 0.3
        yield (
            "One weight was given, and only proportions count. To fix the size, add "
            f"--pruning-ratio {size:g}."
        )


def _removes(plan: Any, model: Any) -> str:
    """What a plan removes from a model: percentages, parameters, memory."""
    found = _removed(plan, model)
    removed = found["removed_parameters"]
    return (
        f"removes {100 * plan.pruning_ratio:.1f}% of the prunable parameters "
        f"({removed:,} of {found['prunable_parameters']:,}), "
        f"{100 * removed / found['parameters']:.1f}% of all parameters, "
        f"{found['removed_bytes'] / 2**20:.1f} MiB"
    )


def _removed(plan: Any, model: Any) -> dict[str, Any]:
    """What a plan removes from a model, by name."""
    prunable = sum(g.width * g.unit_parameters for g in plan.groups)
    removed, weights = prunable - plan.kept_parameters, list(model.parameters())
    return {
        "pruning_ratio": plan.pruning_ratio,
        "removed_parameters": removed,
        "prunable_parameters": prunable,
        "parameters": sum(p.numel() for p in weights),
        "removed_bytes": removed * weights[0].element_size(),
    }


def _active(plan: Any, model: Any) -> Iterator[str]:
    """How much of a mixture of experts computes for a token, before and after."""
    from hipp_ext.budget.active import has_mixtures, size_after, size_of
    from hipp_ext.surgery.masks import match

    if has_mixtures(model):
        before, after = size_of(model), size_after(model, match(model, plan), plan)
        yield (
            f"parameters: {before.parameters:,} -> {after.parameters:,} in all, "
            f"{before.active:,} -> {after.active:,} active for a token; "
            f"{before.flops / 1e9:.3g} -> {after.flops / 1e9:.3g} GFLOP per token"
        )


def _print_plan(plan: Any) -> None:
    from rich.console import Console

    Console(markup=False).print(plan.table())
