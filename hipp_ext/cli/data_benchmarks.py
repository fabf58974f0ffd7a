"""`hipp data repope | amber | hallusionbench | mme`: benchmarks beyond POPE, from their authors'
files.
"""

from pathlib import Path
from typing import Annotated

import typer

from hipp_ext.cli import output
from hipp_ext.cli.console import Overwrite
from hipp_ext.cli.data import data_app

__all__ = ["data_app"]


@data_app.command("repope")
def data_repope(
    annotations: Annotated[
        Path,
        typer.Argument(help="Folder of coco_repope_random.json, ..._popular and ..._adversarial."),
    ],
    images: Annotated[Path, typer.Option(help="Folder of COCO's val2014.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The TSV to write, such as $LMUData/RePOPE.tsv.")
    ],
    ending: Annotated[
        str, typer.Option(help="Text after each question.")
    ] = "Please answer yes or no.",
    overwrite: Overwrite = False,
) -> None:
    """Write RePOPE as a TSV: POPE's pictures with corrected labels, without ambiguous questions.

    Run a stopped command again to continue.

    Example: `hipp data repope RePOPE/annotations --images val2014 -o ~/LMUData/RePOPE.tsv`
    """
    from hipp_ext.evals.data.pope import pope_from_published, write_pope

    questions, source = pope_from_published(annotations, "repope")
    write_pope(
        out,
        questions,
        images,
        source,
        maker="hipp data repope",
        ending=ending,
        overwrite=overwrite,
        progress=output.shows_bars(),
    )
    yes = sum(question.answer == "Yes" for question in questions)
    pictures = len({question.image for question in questions})
    output.say(f"{out}: {len(questions)} questions about {pictures} images, {yes} with answer yes")


@data_app.command("amber")
def data_amber(
    source: Annotated[
        Path, typer.Argument(help="The authors' repository, or its folder data with annotations.")
    ],
    images: Annotated[Path, typer.Option(help="Folder of the pictures, AMBER_1.jpg and so on.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The TSV to write, such as $LMUData/AMBER.tsv.")
    ],
    overwrite: Overwrite = False,
) -> None:
    """Write the discriminative questions of AMBER as VLMEvalKit's TSV.

    Run a stopped command again to continue.

    Example: `hipp data amber ./AMBER --images ./AMBER/image -o ~/LMUData/AMBER.tsv`
    """
    from hipp_ext.evals.data.amber import write_amber

    output.say(
        str(write_amber(source, images, out, overwrite=overwrite, progress=output.shows_bars()))
    )


@data_app.command("hallusionbench")
def data_hallusionbench(
    source: Annotated[Path, typer.Argument(help="HallusionBench.json, or the folder that has it.")],
    images: Annotated[
        Path, typer.Option(help="The folder hallusion_bench, with VD/math/3_1.png and so on.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The TSV to write, such as $LMUData/HallusionBench.tsv."),
    ],
    ending: Annotated[
        str, typer.Option(help="Text after questions that do not ask for yes or no already.")
    ] = "Please answer yes or no.",
    overwrite: Overwrite = False,
) -> None:
    """Write the questions of HallusionBench that have a picture as VLMEvalKit's TSV.

    Run a stopped command again to continue.

    Example: `hipp data hallusionbench ./HallusionBench --images ./hallusion_bench -o
    ~/LMUData/HallusionBench.tsv`
    """
    from hipp_ext.evals.data.hallusionbench import write_hallusionbench

    file, without = write_hallusionbench(
        source, images, out, ending=ending, overwrite=overwrite, progress=output.shows_bars()
    )
    output.say(f"{file}: {without} questions without a picture are left out")


@data_app.command("mme")
def data_mme(
    source: Annotated[
        Path, typer.Argument(help="The folder MME_Benchmark_release_version, with 14 subtasks.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The TSV to write, such as $LMUData/MME.tsv.")
    ],
    overwrite: Overwrite = False,
) -> None:
    """Write MME as VLMEvalKit's TSV.

    Run a stopped command again to continue.

    Example: `hipp data mme ./MME_Benchmark_release_version -o ~/LMUData/MME.tsv`
    """
    from hipp_ext.evals.data.mme import write_mme

    output.say(str(write_mme(source, out, overwrite=overwrite, progress=output.shows_bars())))
