"""`hipp report`: one page about models and what was measured of them."""

from pathlib import Path
from typing import Annotated

import typer

report_app = typer.Typer()


@report_app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="What `hipp demo`, `vlmeval`, `hipp chair`, `hipp fit` or `hipp latency` wrote; "
            "models.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the page. Default: the first DIR.")
    ] = None,
) -> None:
    """Write one self-contained page, report.html: how much smaller, faster and worse each model
    is, where it hurts, and the details.

    Every DIR adds its contents: results and answers of `vlmeval`, captions of `hipp chair`, model
    folders (plans and sizes), a planner (the search), JSON files of `hipp latency`, with or without
    `--runtime`. One report shows the models of all DIRs, the dense one first. Its figures are also
    written as PNG files.

    Examples:

    `hipp report demo`

    `hipp report outputs ./dense ./pruned planner latency.json served.json -o report`
    """
    from hipp_ext.evals.report import write_report

    typer.echo(str(write_report(folders, out)))
