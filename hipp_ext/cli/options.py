"""Options that several planning commands share."""

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hipp_ext.errors import DataError, PlanError
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

PREFERENCE = "Preference"
SIZE = "Size"
METHOD = "Method"
QUESTIONS = "Questions"
DEFAULT_PREFERENCE = Preference(utility=0.4, robustness=0.4, compression=0.2)
Drop = Literal["none", "blocks", "layers"]
RobustnessTest = Literal["pope", "adversarial", "both"]

Utility = Annotated[
    float | None,
    typer.Option(
        "--utility", "-u", metavar="W", help="Weight of task accuracy.", rich_help_panel=PREFERENCE
    ),
]
Robustness = Annotated[
    float | None,
    typer.Option(
        "--robustness",
        "-r",
        metavar="W",
        help="Weight of not hallucinating objects.",
        rich_help_panel=PREFERENCE,
    ),
]
Compression = Annotated[
    float | None,
    typer.Option(
        "--compression",
        "-c",
        metavar="W",
        help="Weight of removing parameters.",
        rich_help_panel=PREFERENCE,
    ),
]
Ratio = Annotated[
    float | None,
    typer.Option(
        "--pruning-ratio",
        metavar="R",
        help="Fraction of the prunable parameters to remove. Default: the planner decides.",
        rich_help_panel=SIZE,
    ),
]
RoundTo = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Keep widths that are multiples of N. Default: 1.",
        rich_help_panel=SIZE,
    ),
]
DropOption = Annotated[
    Drop | None,
    typer.Option(
        "--drop",
        metavar="WHAT",
        help="What may go as a whole: none, blocks (attention or FFN) or layers. Default: none.",
        rich_help_panel=SIZE,
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Folder for measured signals. Default: ~/.cache/hipp-ext."),
]
Pope = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="POPE-like TSV to evaluate plans on. Default: the testbed's questions.",
        rich_help_panel=QUESTIONS,
    ),
]
ScienceQA = Annotated[
    Path | None,
    typer.Option(
        "--scienceqa",
        metavar="FILE",
        help="Multiple-choice TSV to evaluate plans on. Default: the testbed's questions.",
        rich_help_panel=QUESTIONS,
    ),
]
Questions = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Questions per task. 128 find the Pareto front; 1,000 separate similar preferences.",
        rich_help_panel=QUESTIONS,
    ),
]
RobustnessOn = Annotated[
    RobustnessTest,
    typer.Option(
        "--robustness-on",
        metavar="WHAT",
        help="Robustness is measured on pope, adversarial (POPE on attacked pictures) or both.",
        rich_help_panel=QUESTIONS,
    ),
]


def read_preference(
    utility: float | None, robustness: float | None, compression: float | None
) -> Preference | None:
    """The preference; omitted weights are 0. None if all three are omitted."""
    if (utility, robustness, compression) == (None, None, None):
        return None
    return Preference(utility or 0.0, robustness or 0.0, compression or 0.0)


def read_bounds(round_to: int | None, drop: Drop | None) -> dict[str, Any]:
    """The arguments of Bounds that were given."""
    return {k: v for k, v in {"round_to": round_to, "drop": drop}.items() if v is not None}


def check_questions(pope: Path | None, scienceqa: Path | None) -> None:
    """Raise DataError if only one of the two files is given."""
    if (pope is None) != (scienceqa is None):
        raise DataError(
            "Give both --pope and --scienceqa, or neither. Without them the testbed's questions "
            "are used."
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
