"""What the studies share: paired statistics, working folders, results, and the command line."""

import json
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import ArrayLike

from hipp_ext.errors import HippError
from hipp_ext.evals.measuring import describe
from hipp_ext.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
Save = Annotated[
    bool, typer.Option("--save", help="Also write the result to evals/studies/results.")
]


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation; 0 where one of the two is constant."""
    from scipy.stats import spearmanr

    if min(np.ptp(a), np.ptp(b)) == 0:
        return 0.0
    result: Any = spearmanr(a, b)
    return float(result.statistic)


def mean_and_se(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, its standard error (None below two values), and n."""
    n = len(values)
    return {
        "mean": statistics.fmean(values),
        "se": statistics.stdev(values) / n**0.5 if n > 1 else None,
        "n": n,
    }


def pope_by_split(scores: Any, questions: Sequence[Any]) -> dict[str, Any]:
    """Split -> the scores of `Evaluator.scores` on testbed questions, by VLMEvalKit's rule."""
    from hipp_ext.evals.pope import pope_scores

    truth, kinds = [q.answer for q in questions], [q.category for q in questions]
    return pope_scores(scores["pope"].answers, truth, kinds, [str(q.scene) for q in questions])[
        "vlmeval"
    ]


def report(
    name: str,
    values: Mapping[str, Any],
    save: bool,
    *,
    device: str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """`values` with the command line and the machine; also prints them as JSON.

    Args:
        name: name of the study.
        values: what was measured.
        save: write the result to results/<name>.json.
        device: the device that was measured; None: the GPU if there is one.
        out: also write the result to this file.
    """
    result = describe(command_line(), values, device)
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    for file in ([RESULTS / f"{name}.json"] if save else []) + ([out] if out else []):
        write_atomic(file, text)
    return result


def keep_picture(name: str, figure: "Figure", *, save: bool, folder: Path | None = None) -> None:
    """Write a picture to `folder`/<name>.png, and with `save` to results/<name>.png."""
    from hipp_ext.evals.figures import png

    picture = png(figure, dpi=110)
    for place in ([RESULTS] if save else []) + ([folder] if folder else []):
        write_atomic(place / f"{name}.png", picture)


def command_line() -> str:
    """The command that started this process, without --save."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    start = ["python", "-m", spec.name.removesuffix(".__main__")] if spec else ["python"]
    return shlex.join([*start, *(a for a in sys.argv[1:] if a != "--save")])


def run_command(*commands: Callable[..., Any]) -> None:
    """Run `commands` as this process's command line; exits with 2 on bad input.

    One command is the whole command line; several are its subcommands.
    """
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        no_args_is_help=len(commands) > 1,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for command in commands:
        app.command()(command)
    try:
        app()
    except HippError as error:
        typer.secho(f"{type(error).__name__}: {error}", fg="red", err=True)
        sys.exit(2)
