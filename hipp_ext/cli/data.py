"""`hipp data pope | scienceqa`: benchmark files from local copies of the data."""

from pathlib import Path
from typing import Annotated

import typer

from hipp_ext.cli import output
from hipp_ext.cli.console import Overwrite
from hipp_ext.errors import DataError

data_app = typer.Typer(
    no_args_is_help=True, help="Benchmark files for `vlmeval`, built from local copies of the data."
)


@data_app.command("pope")
def data_pope(
    images: Annotated[Path, typer.Option(help="Folder of the images, such as COCO's val2014.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The TSV to write, such as $LMUData/POPE.tsv.")
    ],
    coco_annotations: Annotated[
        Path | None,
        typer.Option(
            help="Build new questions from a COCO instance file, such as instances_val2014.json."
        ),
    ] = None,
    published: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the authors' questions (coco_pope_random.json, ...) to convert."
        ),
    ] = None,
    n: Annotated[
        int, typer.Option("--n", min=1, help="Number of images, with --coco-annotations.")
    ] = 500,
    objects: Annotated[
        int,
        typer.Option(
            min=1,
            help="Questions per image about present objects, and in each split about absent ones.",
        ),
    ] = 3,
    seed: Annotated[
        int, typer.Option(help="Random seed of the sample and of the random objects.")
    ] = 0,
    ending: Annotated[
        str, typer.Option(help="Text after each question.")
    ] = "Please answer yes or no.",
    overwrite: Overwrite = False,
) -> None:
    """Write POPE as a TSV: random, popular and adversarial questions from annotations, or the
    published ones.

    Run a stopped command again to continue.

    Examples:

    `hipp data pope --coco-annotations instances_val2014.json --images val2014 -o
    ~/LMUData/POPE.tsv`

    `hipp data pope --published POPE/output/coco --images val2014 -o ~/LMUData/POPE.tsv`
    """
    from hipp_ext.evals.data.pope import pope_from_annotations, pope_from_published, write_pope

    if coco_annotations is not None and published is None:
        questions, source = pope_from_annotations(
            coco_annotations, n_images=n, per_image=objects, seed=seed
        )
    elif published is not None and coco_annotations is None:
        questions, source = pope_from_published(published)
    else:
        raise DataError(
            "Give one of --coco-annotations (new questions) and --published (the authors' "
            "questions)."
        )
    write_pope(
        out,
        questions,
        images,
        source,
        ending=ending,
        overwrite=overwrite,
        progress=output.shows_bars(),
    )
    splits = (
        f"{split} {sum(split in q.splits for q in questions)}"
        for split in ("random", "popular", "adversarial")
    )
    output.say(
        f"{out}: {len(questions)} questions about {len({q.image for q in questions})} images "
        f"({', '.join(splits)})"
    )


@data_app.command("scienceqa")
def data_scienceqa(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of problems.json, pid_splits.json and images, or of the parquet files."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder of ScienceQA_VAL.tsv and ScienceQA_TEST.tsv."),
    ],
    split: Annotated[list[str] | None, typer.Option(help="val or test. Default: both.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write ScienceQA's questions with an image as VLMEvalKit's TSVs.

    Run a stopped command again to continue.

    Example: `hipp data scienceqa ./ScienceQA/data/scienceqa -o ~/LMUData`
    """
    from hipp_ext.evals.data.scienceqa import TABLES, write_scienceqa

    for file in write_scienceqa(
        source, out, split or tuple(TABLES), overwrite=overwrite, progress=output.shows_bars()
    ):
        typer.echo(str(file))
