"""`hipp report | compare | chair | data | tasks-path | lm-eval | lmms-eval`: evaluation."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from hipp_ext.cli import output
from hipp_ext.cli.console import (
    Device,
    Dtype,
    ModelArgument,
    Overwrite,
    check_dtype,
    command_line,
    model_folder,
    print_wide,
)
from hipp_ext.errors import DataError

evals_app = typer.Typer(no_args_is_help=True)
data_app = typer.Typer(
    no_args_is_help=True, help="Benchmark files for `vlmeval`, built from local copies of the data."
)


@evals_app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="What `hipp demo`, `vlmeval`, `hipp chair`, `hipp fit` or `hipp latency` wrote; "
            "models.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the page. Default: the first DIR.")
    ] = None,
) -> None:
    """Write one self-contained page, report.html: how much smaller, faster and worse each model
    is, where it hurts, and the details.

    Every DIR adds its contents: results and answers of `vlmeval`, captions of `hipp chair`, model
    folders (plans and sizes), a planner (the search), JSON files of `hipp latency`, with or without
    `--runtime`. One report shows the models of all DIRs, the dense one first. Its figures are also
    written as PNG files.

    Examples:

    `hipp report demo`

    `hipp report outputs ./dense ./pruned planner latency.json served.json -o report`
    """
    from hipp_ext.evals.report import write_report

    typer.echo(str(write_report(folders, out)))


@evals_app.command()
def compare(
    a: Annotated[
        Path,
        typer.Argument(metavar="A", help="A folder or predictions.jsonl that `vlmeval` wrote."),
    ],
    b: Annotated[
        Path, typer.Argument(metavar="B", help="The same for the model that is compared with A.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="TSV of the questions, for predictions without a questions.jsonl."),
    ] = None,
    level: Annotated[
        float, typer.Option(min=0.5, max=0.999, help="Confidence level of the intervals.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Random seed of the bootstrap.")] = 0,
    as_json: output.Json = False,
) -> None:
    """Test whether two models differ: accuracies on the same questions, B - A with its interval,
    McNemar's test.

    For yes/no questions, intervals and p (bootstrap) draw whole images. McNemar's test takes
    questions as independent, which is wrong for those about one image, so its p is usually too
    small there. "All right" is the share of pictures with all answers correct: accuracy+ of MME,
    fAcc of HallusionBench. The last column is the number of questions needed to show a difference
    of one point (power 80%, level 5%) between two models that disagree as often as these.

    If the two rules for yes and no agree on every answer, there is one line for both. The hash of a
    folder may be left out.

    Example: `hipp compare outputs/dense outputs/pruned --json > difference.json`
    """
    from rich.console import Console

    from hipp_ext.evals.compare import compare as run
    from hipp_ext.evals.compare import comparison_table, plain

    rows = run(a, b, tsv=data, level=level, seed=seed)
    if as_json:
        output.print_json(
            {"a": str(a), "b": str(b), "level": level, "seed": seed, "comparisons": plain(rows)}
        )
        return
    typer.echo(f"A: {a}\nB: {b}")
    Console().print(comparison_table(rows, level))


@evals_app.command()
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
    print_wide(chair_table([(model, scores)]))
    typer.echo(f"captions and scores: {file.parent}")


@evals_app.command("tasks-path")
def tasks_path(
    host: Annotated[
        Literal["lm-eval", "lmms-eval"], typer.Argument(help="The program that reads them.")
    ] = "lm-eval",
) -> None:
    """Print the folder of our tasks for models of lm-eval or lmms-eval itself.

    Both have hipp_pope, hipp_scienceqa and hipp_scienceqa_val; lm-eval has hipp_repope, hipp_amber,
    hipp_hallusionbench and hipp_mme as well.

    Examples:

    `lm_eval --include_path $(hipp tasks-path) --tasks hipp_pope ...`

    `LMUData=./tsv lmms-eval --include_path $(hipp tasks-path lmms-eval) --tasks hipp_pope ...`
    """
    from hipp_ext.integrations import lm_eval, lmms_eval

    typer.echo(str((lm_eval if host == "lm-eval" else lmms_eval).tasks_path()))


@evals_app.command(
    "lm-eval",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-eval's command line (`hipp lm-eval run --help`) with `--model hipp` and the tasks of
    `hipp tasks-path`.

    Example: `hipp lm-eval run --model hipp --model_args pretrained=./pruned --tasks
    hipp_pope,hipp_scienceqa --metadata lmu_data=./tsv --apply_chat_template --batch_size 8`
    """
    from hipp_ext.integrations.lm_eval import main as run

    raise typer.Exit(run(context.args))


@evals_app.command(
    "lmms-eval",
    context_settings={
        "allow_extra_args": True,
        "allow_interspersed_args": False,
        "ignore_unknown_options": True,
    },
)
def lmms_eval(context: typer.Context) -> None:
    """Run lmms-eval's command line (`hipp lmms-eval eval --help`) with the tasks of `hipp
    tasks-path lmms-eval`, and with `--lmu-data DIR`, the folder of their tables. Default: $LMUData,
    else ~/LMUData.

    Example: `hipp lmms-eval --model hipp --model_args pretrained=./pruned --tasks
    hipp_pope,hipp_scienceqa --lmu-data ./tsv --batch_size 8`
    """
    from hipp_ext.integrations.lmms_eval import main as run

    raise typer.Exit(run(context.args))


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
