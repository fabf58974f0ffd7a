"""`hipp check-serving`: which runtimes serve a model folder, and why the others do not."""

from pathlib import Path

import typer

from hipp_ext.cli import console, output

check_serving_app = typer.Typer()


@check_serving_app.command("check-serving")
def check_serving(model: console.ModelArgument, as_json: output.Json = False) -> None:
    """Tell which runtimes serve a model folder as it is, and why the others do not.

    No weights are read. The exit status is 0 whatever the answer.

    Examples:

    - `hipp check-serving ./pruned`
    - `hipp check-serving ./llava-1.5-7b-hf --json`
    """
    console.require_model(model)
    from hipp_ext.integrations.serving import check_serving as verdicts

    folder = Path(console.model_folder(model))
    found = verdicts(folder)
    if as_json:
        output.print_json(
            [
                {"runtime": v.runtime, "reasons": list(v.reasons), "command": v.command}
                for v in found
            ]
        )
        return
    for verdict in found:
        answer = "no" if verdict.reasons else "yes"
        typer.echo(f"{verdict.runtime:<13}{answer:<5}{'' if verdict.reasons else verdict.command}")
        for reason in verdict.reasons:
            typer.echo(output.fitted(f"  {reason}"))
