"""`hipp perplexity`: how well models predict the user's own rows, and what they write."""

from pathlib import Path
from typing import Annotated

import typer

from hipp_ext.cli import output
from hipp_ext.cli.console import (
    Device,
    Dtype,
    check_dtype,
    command_line,
    named_folders,
    require_model,
)

perplexity_app = typer.Typer()


@perplexity_app.command()
def perplexity(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Model folders, dense first, or `testbed`."),
    ],
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Rows that no model was calibrated or trained on: chats or texts (.jsonl, .json), "
            ".txt, VLMEvalKit .tsv, or a saved datasets folder.",
        ),
    ],
    image_folder: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of the picture paths in FILE. Default: that of FILE."
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows to take, evenly spaced. Default: 128.")
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="L",
            help="Tokens after which a row is cut. Default: 2048, or the tokenizer's limit.",
        ),
    ] = None,
    answers: Annotated[
        int, typer.Option(min=0, help="Rows that every model also answers, greedily.")
    ] = 4,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum length of an answer [tokens].")
    ] = 64,
    device: Device = None,
    dtype: Dtype = None,
    as_json: output.Json = False,
) -> None:
    """Compare models on your own rows: perplexity of the answers, and answers side by side.

    The first model is compared with the others, with intervals over rows. "Repeated" is the share
    of 4-grams of words in the written answers that stand earlier in the same answer: a pruned
    model whose perplexity looks well may still repeat itself.

    Examples:

    `hipp perplexity ./dense ./pruned --data held-out.jsonl`

    `hipp perplexity ./dense ./pruned ./recovered --data held-out.jsonl --answers 8 --json`
    """
    output.only_json(as_json)
    check_dtype(dtype)
    for model in models:
        require_model(model)
    folders = named_folders(models)
    from hipp_ext.evals.perplexity import answer_lines, perplexity_table, repeating, run
    from hipp_ext.evals.text_table import print_table

    result = run(
        folders,
        data,
        image_folder=image_folder,
        rows=rows,
        sequence_length=sequence_length,
        answers=answers,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        progress=output.shows_progress(),
        command=command_line(),
    )
    if as_json:
        output.print_json(result)
    else:
        print_table(perplexity_table(result))
        for line in answer_lines(result):
            typer.echo(output.fitted(line))
    if looping := repeating(result):
        output.warn(
            f"{', '.join(looping)}: answers repeat themselves, more than those of the first model. "
            "Recover it, remove less, or reconstruct on more varied rows."
        )
