"""`hipp compare`: do two models differ on the same questions?"""

from pathlib import Path
from typing import Annotated

import typer

from hipp_ext.cli import output

compare_app = typer.Typer()


@compare_app.command()
def compare(
    a: Annotated[
        Path,
        typer.Argument(metavar="A", help="A folder or predictions.jsonl that `vlmeval` wrote."),
    ],
    b: Annotated[
        Path, typer.Argument(metavar="B", help="The same for the model that is compared with A.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="TSV of the questions, for predictions without a questions.jsonl."),
    ] = None,
    level: Annotated[
        float, typer.Option(min=0.5, max=0.999, help="Confidence level of the intervals.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Random seed of the bootstrap.")] = 0,
    as_json: output.Json = False,
) -> None:
    """Test whether two models differ: accuracies on the same questions, B - A with its interval,
    McNemar's test.

    For yes/no questions, intervals and p (bootstrap) draw whole images. McNemar's test takes
    questions as independent, which is wrong for those about one image, so its p is usually too
    small there. "All right" is the share of pictures with all answers correct: accuracy+ of MME,
    fAcc of HallusionBench. The last column is the number of questions needed to show a difference
    of one point (power 80%, level 5%) between two models that disagree as often as these.

    If the two rules for yes and no agree on every answer, there is one line for both. The hash of a
    folder may be left out.

    Example: `hipp compare outputs/dense outputs/pruned --json > difference.json`
    """
    from rich.console import Console

    from hipp_ext.evals.compare import compare as run
    from hipp_ext.evals.compare import comparison_table, plain

    rows = run(a, b, tsv=data, level=level, seed=seed)
    if as_json:
        output.print_json(
            {"a": str(a), "b": str(b), "level": level, "seed": seed, "comparisons": plain(rows)}
        )
        return
    typer.echo(f"A: {a}\nB: {b}")
    Console().print(comparison_table(rows, level))
