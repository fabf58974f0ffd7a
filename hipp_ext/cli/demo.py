"""`hipp demo`: the whole pipeline on the testbed."""

from pathlib import Path
from typing import Annotated

import typer

from hipp_ext.cli.output import say, shows_progress

demo_app = typer.Typer()


@demo_app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for all results.")
    ] = Path("demo"),
    steps: Annotated[
        int, typer.Option(min=1, metavar="N", help="Policy updates of the fit, 12 plans each.")
    ] = 20,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Questions per benchmark in the final evaluation. Default: all.",
        ),
    ] = None,
) -> None:
    """Run the whole pipeline on the testbed.

    The demo fits a planner, makes plans for three preferences, prunes, evaluates with VLMEvalKit
    and writes a report. It takes minutes on two cores; a second run resumes.

    Examples:

    - `hipp demo`
    - `hipp demo --out demo --steps 5 --limit 100`
    """
    from hipp_ext.evals.demo import DemoSize, run_demo
    from hipp_ext.planner.settings import FitSettings

    run_demo(
        out,
        DemoSize(settings=FitSettings(steps=steps), limit=limit),
        log=say,
        progress=shows_progress(),
    )
