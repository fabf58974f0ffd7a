"""Options that several commands share, and what their values stand for."""

import ast
import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hipp_ext.errors import CalibrationError, DataError, PlanError
from hipp_ext.preference import Preference


def _names(package: str, registry: str) -> tuple[str, ...]:
    """The names in a registry, read from the package's source: an import would load torch."""
    source = find_spec(package).loader.get_source(package)  # type: ignore[union-attr]
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == registry:
            return tuple(ast.literal_eval(name) for name in node.value.keys)  # type: ignore[union-attr]
    raise AssertionError(f"{package} has no {registry}")


SCORERS = _names("hipp_ext.scorers", "SCORERS")
ALLOCATORS = _names("hipp_ext.allocators", "ALLOCATORS")

# Options by the panel that they have in the help.
method_option = functools.partial(typer.Option, rich_help_panel="Method")
size_option = functools.partial(typer.Option, rich_help_panel="Size")
limit_option = functools.partial(typer.Option, rich_help_panel="Limits")
question_option = functools.partial(typer.Option, rich_help_panel="Questions")
_weight = functools.partial(typer.Option, rich_help_panel="Preference", metavar="W")
_calibration = functools.partial(typer.Option, rich_help_panel="Calibration")

DEFAULT_PREFERENCE = Preference(utility=0.4, robustness=0.4, compression=0.2)
# Multiples of widths: a block of q8_0 has 32 columns, and other matrices stay in f16; groups of
# W4A16 likewise, and vLLM's kernels on CPUs are faster.
ROUND_TO = {"gguf": 32, "vllm": 32}
TASKS = ("utility", "robustness")  # those of hipp_ext.calibration, which imports torch
Drop = Literal["none", "blocks", "layers"]
Shape = Literal["free", "uniform", "layers", "stock"]
Serve = Literal["any", "stock", "vllm", "gguf"]
Cost = Literal["parameters", "latency"]
Phase = Literal["decode", "prefill"]
RobustnessTest = Literal["pope", "adversarial", "both"]
Effort = Literal["fisher", "anchored", "measured"]
AttentionUnit = Literal["kv", "query"]
ExpertUnit = Literal["expert", "channel"]
Partial = Literal["refuse", "report"]
TOWERS = ("language", "vision", "projector")  # those of hipp_ext.towers, which imports torch

Utility = Annotated[float | None, _weight("--utility", "-u", help="Weight of task accuracy.")]
Robustness = Annotated[
    float | None, _weight("--robustness", "-r", help="Weight of not hallucinating objects.")
]
Compression = Annotated[
    float | None, _weight("--compression", "-c", help="Weight of removing parameters.")
]
Ratio = Annotated[
    float | None,
    size_option(metavar="R", help="Fraction of prunable parameters to remove. Default: planner's."),
]
RoundTo = Annotated[
    int | None,
    size_option(min=1, metavar="N", help="Keep widths that are multiples of N. Default: 1."),
]
DropOption = Annotated[
    Drop | None,
    size_option(
        metavar="WHAT",
        help="What may go as a whole: none, blocks (attention or FFN) or layers. Default: none.",
    ),
]
ShapeOption = Annotated[
    Shape | None,
    size_option(
        metavar="SHAPE",
        help="free: widths by layer; uniform: one for all layers; layers: whole layers go; stock: "
        "the better of the last two. Default: free.",
    ),
]
ServeOption = Annotated[
    Serve,
    size_option(
        metavar="RUNTIME",
        show_default=False,
        help="Plan for what will serve the model: any, stock (transformers without hipp-ext), "
        "vllm or gguf (llama.cpp); these two set --round-to to 32. Default: any.",
    ),
]
MaxMemory = Annotated[
    float | None,
    limit_option(metavar="MB", help="Largest size of all weights [10^6 bytes]; more is removed."),
]
MaxLatency = Annotated[
    float | None,
    limit_option(metavar="MS", help="Longest time by --latency-from; more is removed."),
]
LatencyFrom = Annotated[
    Path | None,
    limit_option(metavar="TABLE", help="Times that `hipp latency --per-block` measured."),
]
LatencyOf = Annotated[
    Phase,
    limit_option(
        metavar="PHASE",
        show_default=False,
        help="decode (a further token) or prefill (prompt). Default: decode.",
    ),
]
CostOption = Annotated[
    Cost,
    size_option(
        metavar="WHAT",
        show_default=False,
        help="What --pruning-ratio is a fraction of: parameters, or the dense model's latency. "
        "Default: parameters.",
    ),
]
ScorerOption = Annotated[
    str | None,
    method_option(
        "--scorer",
        metavar="NAME",
        help=f"Ranks the units of a group: {', '.join(SCORERS)}. Default: wanda_sp.",
    ),
]
AllocatorOption = Annotated[
    str,
    method_option(
        "--allocator",
        metavar="NAME",
        show_default=False,
        help="Decides how many units each group keeps: planner (by the preference), or "
        f"{', '.join(ALLOCATORS)} (by the ratio). Default: planner.",
    ),
]
AttentionUnitOption = Annotated[
    AttentionUnit | None,
    method_option(
        metavar="UNIT",
        help="Units of attention: kv (whole KV groups) or query (query heads, as many of every KV "
        "group; keys and values stay). Default: kv.",
    ),
]
TowersOption = Annotated[
    str | None,
    size_option(
        "--towers",
        metavar="LIST",
        help="What is pruned, under one budget: language, vision, projector, or several with "
        "commas between. Default: language.",
    ),
]
ExpertUnitOption = Annotated[
    ExpertUnit | None,
    method_option(
        metavar="UNIT",
        help="Units of mixtures of experts: expert (as many stay as a token is sent to) or channel "
        "(of all experts). Default: expert.",
    ),
]
PartialOption = Annotated[
    Partial,
    method_option(
        metavar="CHOICE",
        show_default=False,
        help="Parts of layers that cannot be pruned (mixers of hybrids): refuse, or report and "
        "leave them whole. Default: refuse.",
    ),
]
EffortOption = Annotated[
    Effort | None,
    method_option(
        metavar="NAME",
        help="Sensitivity: fisher (fast), anchored or measured (slow). Default: anchored.",
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Folder for measured signals. Default: ~/.cache/hipp-ext."),
]
Pope = Annotated[
    Path | None,
    question_option(
        metavar="FILE", help="POPE-like TSV to evaluate plans on. Default: the testbed's questions."
    ),
]
ScienceQA = Annotated[
    Path | None,
    question_option(
        metavar="FILE",
        help="Multiple-choice TSV to evaluate plans on. Default: the testbed's questions.",
    ),
]
References = Annotated[
    Path | None,
    question_option(
        metavar="FILE",
        help="Questions with open answers (captions), which count for utility. Default: none.",
    ),
]
Questions = Annotated[
    int,
    question_option(
        min=1,
        metavar="N",
        help="Questions per task, drawn at random from a file. 128 find the Pareto front; 1,000 "
        "separate similar preferences.",
    ),
]
RobustnessOn = Annotated[
    RobustnessTest,
    question_option(
        metavar="WHAT",
        help="Robustness is measured on pope, adversarial (POPE on attacked pictures) or both.",
    ),
]
CalibrationFiles = Annotated[
    list[str] | None,
    _calibration(
        metavar="FILE",
        help="Your data: VLMEvalKit .tsv, chats or texts (.jsonl, .json), .txt, or a saved "
        "datasets folder; or twice, as utility=FILE and robustness=FILE. Default: built-in "
        "questions about a toy world.",
    ),
]
ImageFolder = Annotated[
    Path | None,
    _calibration(metavar="DIR", help="Folder of the picture paths in FILE. Default: that of FILE."),
]
CalibrationRows = Annotated[
    int | None,
    _calibration(
        min=2,
        metavar="N",
        help="Rows to take, evenly spaced. Default: 128 of FILE; 64 of the built-in questions, "
        "256 for --reconstruct.",
    ),
]
SequenceLength = Annotated[
    int | None,
    _calibration(
        min=2,
        metavar="L",
        help="Tokens after which a row of FILE is cut. Default: 2048, or the tokenizer's limit.",
    ),
]


def read_calibration(
    files: list[str] | None,
    image_folder: Path | None,
    rows: int | None,
    sequence_length: int | None,
    *,
    references: Path | None = None,
) -> Callable[[Any, Any], Any]:
    """Check the four options; the result makes their Calibration of a model and its processor.

    That is None where no option was given, and raises CalibrationError or DataError where the file
    cannot be used. `image_folder` may be given for `references` alone.

    Raises:
        CalibrationError: the options do not go together.
    """
    paths = calibration_paths(files)
    if not paths and ((image_folder and references is None) or sequence_length):
        raise CalibrationError(
            "--image-folder and --sequence-length describe the rows of --calibration FILE: give a "
            "file as well."
        )

    def read(model: Any, processor: Any) -> Any:
        from hipp_ext.calibration import Calibration

        if not paths:
            return Calibration.of(model, None, processor, rows) if rows else None
        return Calibration.from_file(
            paths, processor, image_folder=image_folder, rows=rows, sequence_length=sequence_length
        )

    return read


def calibration_paths(files: list[str] | None) -> Any:
    """What --calibration named: a file, or a file for each task; None: nothing.

    Raises:
        CalibrationError: it was given another number of times, or tasks are missing.
    """
    files = files or []
    named = [file.partition("=") for file in files]
    by_task = {task: path for task, _, path in named if task in TASKS and path}
    if len(by_task) not in (0, len(TASKS)) or len(files) > max(1, len(by_task)):
        raise CalibrationError(
            "Give --calibration once, or twice as --calibration utility=FILE --calibration "
            f"robustness=FILE; got {', '.join(files)}."
        )
    return by_task or (files[0] if files else None)


def read_preference(
    utility: float | None, robustness: float | None, compression: float | None
) -> Preference | None:
    """The preference; omitted weights are 0. None if all three are omitted."""
    if (utility, robustness, compression) == (None, None, None):
        return None
    return Preference(utility or 0.0, robustness or 0.0, compression or 0.0)


def read_towers(text: str | None) -> tuple[Any, ...] | None:
    """The towers of --towers; None where it was not given.

    Raises:
        PlanError: a tower is unknown, or named twice.
    """
    if text is None:
        return None
    towers = tuple(part.strip() for part in text.split(","))
    if len(set(towers)) < len(towers) or not set(towers) <= set(TOWERS):
        raise PlanError(f"--towers {text}: expected some of {', '.join(TOWERS)}, each once.")
    return towers


def read_bounds(
    round_to: int | None, drop: Drop | None, shape: Shape | None = None, serve: Serve = "any"
) -> dict[str, Any]:
    """The arguments of Bounds that were given, or that a runtime needs.

    Raises:
        PlanError: stock transformers is to serve free shapes.
    """
    if serve == "stock":
        if shape == "free" or drop not in (None, "none"):
            raise PlanError(
                "--serve stock needs layers that are all alike: omit --drop, and take --shape "
                "uniform, layers or stock (the default)."
            )
        shape = shape or "stock"
    if round_to is None:
        round_to = ROUND_TO.get(serve)
    given = {"round_to": round_to, "drop": drop, "shape": shape}
    return {k: v for k, v in given.items() if v is not None}


def read_limits(
    max_memory_mb: float | None,
    max_latency_ms: float | None,
    table: Path | None,
    phase: Phase,
    cost: Cost,
    pruning_ratio: float | None,
) -> tuple[Any, float | None]:
    """(Limits, pruning_ratio in parameters) of the options.

    Raises:
        BudgetError, DataError: a limit is no positive number, or the table is none.
        PlanError: a ratio of latency, or a table, is not complete.
    """
    from hipp_ext.budget import check_ratio
    from hipp_ext.latency_table import LatencyTable
    from hipp_ext.limits import Limits

    if pruning_ratio is not None:
        check_ratio(pruning_ratio)
    latency = None if table is None else LatencyTable.load(table)
    if cost == "latency":
        if latency is None or pruning_ratio is None or max_latency_ms is not None:
            raise PlanError(
                "--cost latency needs --pruning-ratio, which is then a fraction of the latency, "
                "and --latency-from; it excludes --max-latency-ms."
            )
        max_latency_ms = (1 - pruning_ratio) * latency.dense_ms(phase)
        pruning_ratio = 0.0
    elif latency is not None and max_latency_ms is None:
        raise PlanError("--latency-from needs --max-latency-ms, or --cost latency.")
    limits = Limits(
        max_memory_mb=max_memory_mb, max_latency_ms=max_latency_ms, latency=latency, phase=phase
    )
    return limits, pruning_ratio


@dataclass(frozen=True, kw_only=True)
class QuestionFiles:
    """The files that plans are evaluated on.

    Attributes:
        pope: POPE-like TSV; None: the testbed's questions.
        scienceqa: multiple-choice TSV; None: the testbed's questions, or none beside `pope`.
        references: open questions with their answers; None: none.
        image_folder: folder of the pictures of `references`; None: the folder of the file.

    Raises:
        DataError: only one of the objectives has questions.
    """

    pope: Path | None = None
    scienceqa: Path | None = None
    references: Path | None = None
    image_folder: Path | None = None

    def __post_init__(self) -> None:
        if self.pope is None and self.scienceqa is None:
            return
        if self.pope is None or (self.scienceqa is None and self.references is None):
            raise DataError(
                "Give both --pope and --scienceqa, or neither; --references may stand for "
                "--scienceqa. Without --pope and --scienceqa the testbed's questions are used."
            )


def registered(kind: Literal["scorer", "allocator"], name: str) -> Any:
    """The scorer or allocator class of that name.

    Raises:
        PlanError: there is none.
    """
    registry = getattr(import_module(f"hipp_ext.{kind}s"), f"{kind.upper()}S")
    if name not in registry:
        raise PlanError(f"--{kind} {name}: expected one of {', '.join(registry)}.")
    return registry[name]
