"""The command of the table."""

import time
from pathlib import Path
from typing import Annotated

import typer

from hipp_ext.evals.studies.measuring import Save
from hipp_ext.evals.studies.smolworld.drawings import ASKED
from hipp_ext.evals.studies.smolworld.packages import MODEL
from hipp_ext.evals.studies.smolworld.table.cells import CHIEF, RATIOS, REPAIRS, Filters
from hipp_ext.evals.studies.smolworld.table.methods import IN_TABLE
from hipp_ext.evals.studies.smolworld.table.sizes import QUICK, Sizes

OFTEN = 300.0  # seconds between two summaries
Model = Annotated[
    Path, typer.Option(help="Folder of the trained model.", show_default=".smolworld/model")
]
Out = Annotated[Path, typer.Option(help="Folder of the run, which goes on if interrupted.")]
Concepts = Annotated[
    int | None, typer.Option(min=40, help=f"Concepts of the model's world. Default: {ASKED}.")
]
Seeds = Annotated[int | None, typer.Option(min=1, help="Seeds of a search. Default: 2.")]
Quick = Annotated[
    bool, typer.Option("--quick", help="A first look: one seed, 30% alone, few questions.")
]
Pictures = Annotated[int | None, typer.Option(help="Pictures of the test. Default: 96.")]
Choices = Annotated[int | None, typer.Option(help="Choices of the test. Default: 384.")]
Search = Annotated[
    int | None, typer.Option(help="Questions per task that evaluate a plan. Default: 128.")
]
Calibration = Annotated[
    int | None, typer.Option(help="Rows per task of the calibration. Default: 32.")
]
Evaluations = Annotated[int | None, typer.Option(help="Plans of a search. Default: 60.")]
Steps = Annotated[int | None, typer.Option(help="Steps of the equal recovery. Default: 40.")]
Dtype = Annotated[str | None, typer.Option(help="Type of evaluation. Default: bfloat16.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of all processes.")]
Processes = Annotated[int, typer.Option(min=1, help="Models that are measured at the same time.")]


def table(
    model: Model = MODEL,
    out: Out = Path("outputs/table"),
    ratio: Annotated[
        list[float] | None,
        typer.Option(help=f"A pruning_ratio. Default: {', '.join(map(str, RATIOS))}."),
    ] = None,
    fit_ratio: Annotated[
        list[float] | None, typer.Option(help=f"A ratio of searches. Default: {CHIEF}.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help=f"One of: {'; '.join(IN_TABLE)}. Default: all.")
    ] = None,
    repair: Annotated[
        list[str] | None, typer.Option(help=f"One of: {', '.join(REPAIRS)}. Default: all.")
    ] = None,
    seeds: Seeds = None,
    quick: Quick = False,
    pictures: Pictures = None,
    choices: Choices = None,
    search: Search = None,
    calibration: Calibration = None,
    evaluations: Evaluations = None,
    steps: Steps = None,
    dtype: Dtype = None,
    concepts: Concepts = None,
    threads: Threads = 2,
    processes: Processes = 1,
    save: Save = False,
) -> None:
    """Prune a trained model by every method: POPE, CHAIR, multiple choice, perplexity.

    Cells are kept in OUT, and a killed run goes on. Result, pictures and section for RESULTS.md are
    written to OUT from time to time, and with --save to evals/studies/results. The test split is
    touched once per cell. The command says first how long it will take.

    `python -m hipp_ext.evals.studies.smolworld table --save`

    `python -m hipp_ext.evals.studies.smolworld table --quick --out outputs/quick`
    """
    from hipp_ext.evals.studies.smolworld.table.place import Place
    from hipp_ext.evals.studies.smolworld.table.start import run, start
    from hipp_ext.evals.studies.smolworld.table.writing import write_table

    filters = Filters(
        methods=method or (),
        ratios=ratio or default_ratios(quick),
        fit_ratios=fit_ratio or (CHIEF,),
        repairs=repair or (),
        seeds=seeds or (1 if quick else 2),
    )
    sizes = chosen_sizes(
        quick,
        pictures=pictures,
        choices=choices,
        search=search,
        calibration=calibration,
        evaluations=evaluations,
        steps=steps,
        dtype=dtype,
    )
    place = Place(
        model=model, out=out, sizes=sizes, ratios=tuple(filters.ratios), concepts=concepts
    )
    study = start(place, filters.cells(), threads)
    written = time.monotonic()
    with study.locked():
        for number, rows in enumerate(run(study, place, processes, threads)):
            due = number == 0 or not study.left() or time.monotonic() - written > OFTEN
            if due:
                about = {"identity": study.bench.identity, **study.about()}
                write_table(rows, study.bench.asked, about, out, save)
                written = time.monotonic()
    typer.echo(out / "smolworld_table.md")


def default_ratios(quick: bool) -> tuple[float, ...]:
    """All ratios, or that of a first look."""
    return (CHIEF,) if quick else RATIOS


def chosen_sizes(quick: bool, **options: int | str | None) -> Sizes:
    """The default sizes, or those of a first look, with what was asked for otherwise."""
    import dataclasses

    given = {name: value for name, value in options.items() if value is not None}
    return dataclasses.replace(QUICK if quick else Sizes(), **given)  # type: ignore[arg-type]
