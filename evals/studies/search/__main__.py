"""Command line of the search study."""

from pathlib import Path
from typing import Annotated

import typer

from hipp_ext.evals.studies.measuring import Save, run_command
from hipp_ext.evals.studies.search.study import StudySize
from hipp_ext.evals.studies.search.summary import run


def main(
    out: Annotated[Path, typer.Option(help="Folder of finished jobs.")] = Path("search"),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 5,
    evaluations: Annotated[int, typer.Option(min=12, help="Plans each method may evaluate.")] = 300,
    questions: Annotated[
        tuple[int, int],
        typer.Option(min=8, metavar="N N", help="POPE and ScienceQA questions, search split."),
    ] = (1024, 512),
    processes: Annotated[int | None, typer.Option(min=1, help="Default: one per core.")] = None,
    save: Save = False,
) -> None:
    """Compare the planner with allocators and search methods at equal evaluations.

    The testbed's test split judges the plans. The study takes some three hours on two cores; an
    interrupted study continues.

    Examples:

    `python -m hipp_ext.evals.studies.search --out search`

    `python -m hipp_ext.evals.studies.search --seeds 2 --evaluations 60 --questions 64 32
    --out quick`
    """
    size = StudySize(seeds=seeds, evaluations=evaluations, questions=questions)
    run(size, out, processes=processes, save=save)


if __name__ == "__main__":
    run_command(main)
