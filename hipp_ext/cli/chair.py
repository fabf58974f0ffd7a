"""`hipp chair`: objects in captions that are not in the picture."""

from pathlib import Path
from typing import Annotated

import typer

from hipp_ext.cli import output
from hipp_ext.cli.console import (
    Device,
    Dtype,
    ModelArgument,
    check_dtype,
    command_line,
    model_folder,
)
from hipp_ext.errors import DataError

chair_app = typer.Typer()


@chair_app.command()
def chair(
    model: ModelArgument,
    n: Annotated[int, typer.Option("--n", min=2, help="Number of images to describe.")] = 200,
    annotations: Annotated[
        Path | None,
        typer.Option(
            help="COCO instance file, such as instances_val2014.json. Default: testbed scenes."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images that the annotations name.")
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(help="COCO caption file. The objects that it names count as present."),
    ] = None,
    synonyms: Annotated[
        Path | None,
        typer.Option(
            help="Other names of objects: JSON, or lines `person, girl, boy`. Default: none."
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Prompt of the model. Default: it asks for a brief description."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum length of a caption, for COCO [tokens].")
    ] = 64,
    seed: Annotated[int, typer.Option(help="Random seed of the sample of images.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 8,
    work_dir: Annotated[
        Path, typer.Option(help="Folder of captions and scores, where a stopped run continues.")
    ] = Path("outputs"),
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """CHAIR: let a model describe images, and count the objects it names that are not in them.

    Examples:

    `hipp chair testbed --n 200`

    `hipp chair ./pruned --annotations instances_val2014.json --captions captions_val2014.json
    --images val2014`
    """
    from hipp_ext.evals.captions import PROMPT, chair_table, coco_task, measure_chair, scenes_task
    from hipp_ext.evals.hipp_vlm import check_model_folder
    from hipp_ext.evals.text_table import print_table
    from hipp_ext.testbed.model import is_of_testbed

    check_dtype(dtype)
    if (annotations is None) != (images is None):
        raise DataError(
            "Give both --annotations and --images, or neither, to describe scenes of the testbed."
        )
    if annotations is None and (captions or synonyms or prompt):
        raise DataError(
            "--captions, --synonyms and --prompt need --annotations; the testbed has its own."
        )
    if annotations is None or images is None:
        task = scenes_task(n)
        if not is_of_testbed(check_model_folder(model_folder(model))):
            output.warn(
                "the model describes drawings of the built-in toy world, which says nothing about "
                "other pictures. Pass your own by --annotations and --images."
            )
    else:
        task = coco_task(
            annotations,
            images,
            n,
            captions=captions,
            synonyms=synonyms,
            prompt=prompt or PROMPT,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
    scores, file = measure_chair(
        model_folder(model),
        task,
        work_dir=work_dir,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        progress=output.shows_bars(),
        command=command_line(),
    )
    print_table(chair_table([(model, scores)]))
    typer.echo(f"captions and scores: {file.parent}")
