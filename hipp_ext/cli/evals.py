"""`hipp report | compare | chair | data | tasks-path | lm-eval`: numbers, and what they are made from."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from hipp_ext.cli.console import (
    Device,
    Dtype,
    ModelArgument,
    Overwrite,
    check_dtype,
    model_folder,
    print_wide,
    say,
    write_json,
)
from hipp_ext.errors import DataError
from hipp_ext.files import require_new_file

evals_app = typer.Typer(no_args_is_help=True)
data_app = typer.Typer(
    no_args_is_help=True, help="Benchmark files for `vlmeval`, built from local copies of the data."
)
evals_app.add_typer(data_app, name="data")


@evals_app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="What `hipp demo`, `vlmeval`, `hipp fit` or `hipp latency` wrote; models.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the page; default: the first DIR."),
    ] = None,
) -> None:
    """One self-contained page, report.html, and PNGs: front, units kept, POPE by split, disagreements, cost, how it was made.

    Every DIR adds what lies in it: results of `vlmeval` and its answers, model folders (plans and sizes), a planner (front,
    visual sensitivity), latency.json. The models of all DIRs stand in one report, the dense one first.

    Examples:

    `hipp report demo`

    `hipp report outputs ./dense ./pruned planner latency.json -o report`
    """
    from hipp_ext.evals.report import write_report

    say(str(write_report(folders, out)))


@evals_app.command()
def compare(
    a: Annotated[
        Path,
        typer.Argument(metavar="A", help="A folder or predictions.jsonl that `vlmeval` wrote."),
    ],
    b: Annotated[
        Path, typer.Argument(metavar="B", help="Another, of the model that is compared with A.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="The TSV that was asked, for predictions without a questions.jsonl beside them."
        ),
    ] = None,
    level: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write all numbers here.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Say whether two models differ: accuracies on the same questions, B - A with its interval, McNemar's test.

    Intervals and p (bootstrap) draw whole pictures for POPE. McNemar's test takes questions as independent, which those
    about one picture are not, so there its p is too small as a rule. The last column: questions that would show one point
    of difference (power 80%, level 5%) between two models that disagree as often as these.

    Where POPE's two rules read every answer alike, one line stands for both. Folders may be named without their hash.

    Example: `hipp compare outputs/dense outputs/pruned --json difference.json`
    """
    from hipp_ext.evals.compare import compare as run
    from hipp_ext.evals.compare import comparison_table, plain

    if json_file is not None:
        require_new_file(json_file, overwrite)
    rows = run(a, b, tsv=data, level=level, seed=seed)
    say(f"A: {a}\nB: {b}")
    print_wide(comparison_table(rows, level))
    if json_file is not None:
        write_json(
            json_file,
            {"a": str(a), "b": str(b), "level": level, "seed": seed, "comparisons": plain(rows)},
        )


@evals_app.command()
def chair(
    model: ModelArgument,
    n: Annotated[int, typer.Option("--n", min=2, help="Pictures to describe.")] = 200,
    annotations: Annotated[
        Path | None,
        typer.Option(
            help="COCO instance file, such as instances_val2014.json; default: the testbed's scenes."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures that the annotations name.")
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(help="COCO caption file; what it names counts as being in the picture."),
    ] = None,
    synonyms: Annotated[
        Path | None,
        typer.Option(
            help="Other names of the objects: JSON, or lines `person, girl, boy`; default: plurals only."
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What the model is asked; default: a brief description.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest caption, for COCO.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the sample of pictures.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 8,
    work_dir: Annotated[
        Path, typer.Option(help="For captions and scores; a stopped run goes on there.")
    ] = Path("outputs"),
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """CHAIR: let a model describe pictures, and count the objects it names that are not there.

    Examples:

    `hipp chair testbed --n 200`

    `hipp chair ./pruned --annotations instances_val2014.json --captions captions_val2014.json --images val2014`
    """
    from hipp_ext.evals.captions import PROMPT, chair_table, coco_task, measure_chair, scenes_task

    check_dtype(dtype)
    if (annotations is None) != (images is None):
        raise DataError(
            "Give both --annotations and --images, or neither (then the testbed's scenes are described)."
        )
    if annotations is None and (captions or synonyms or prompt):
        raise DataError(
            "--captions, --synonyms and --prompt go with --annotations; the testbed has its own."
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
        progress=sys.stderr.isatty(),
    )
    print_wide(chair_table([(model, scores)]))
    say(f"captions and scores: {file.parent}")


@evals_app.command("tasks-path")
def tasks_path() -> None:
    """Print the folder of the lm-eval tasks hipp_pope, hipp_scienceqa and hipp_scienceqa_val.

    Example: `lm_eval --include_path $(hipp tasks-path) --tasks hipp_pope ...`, for one of lm-eval's own models
    """
    from hipp_ext.integrations.lm_eval import tasks_path as path

    say(str(path()))


@evals_app.command(
    "lm-eval",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)
def lm_eval(context: typer.Context) -> None:
    """lm-eval's own command line (`hipp lm-eval run --help`), with `--model hipp` and the tasks of `hipp tasks-path` known.

    Example: `hipp lm-eval run --model hipp --model_args pretrained=./pruned --tasks hipp_pope,hipp_scienceqa
    --metadata lmu_data=./tsv --apply_chat_template --batch_size 8`
    """
    from hipp_ext.integrations.lm_eval import main as run

    raise typer.Exit(run(context.args))


@data_app.command("pope")
def data_pope(
    images: Annotated[Path, typer.Option(help="Folder of the pictures, such as COCO's val2014.")],
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
            help="Convert the authors' questions: folder of coco_pope_random.json and so on."
        ),
    ] = None,
    n: Annotated[
        int, typer.Option("--n", min=1, help="Pictures to ask about, with --coco-annotations.")
    ] = 500,
    objects: Annotated[
        int,
        typer.Option(min=1, help="Present objects, and absent ones per split, for each picture."),
    ] = 3,
    seed: Annotated[int, typer.Option(help="Of the sample and of the random objects.")] = 0,
    ending: Annotated[
        str, typer.Option(help="Put after each question.")
    ] = "Please answer yes or no.",
    overwrite: Overwrite = False,
) -> None:
    """POPE as a TSV: random, popular and adversarial questions from annotations, or the published ones.

    Stopped, the same command goes on from where it was.

    Examples:

    `hipp data pope --coco-annotations instances_val2014.json --images val2014 -o ~/LMUData/POPE.tsv`

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
            "Give one of --coco-annotations (new questions) and --published (the authors' questions)."
        )
    write_pope(
        out,
        questions,
        images,
        source,
        ending=ending,
        overwrite=overwrite,
        progress=sys.stderr.isatty(),
    )
    splits = (
        f"{split} {sum(split in q.splits for q in questions)}"
        for split in ("random", "popular", "adversarial")
    )
    say(
        f"{out}: {len(questions)} questions about {len({q.image for q in questions})} pictures ({', '.join(splits)})"
    )


@data_app.command("scienceqa")
def data_scienceqa(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder with problems.json, pid_splits.json and images, or with the hub's parquet files."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder for ScienceQA_VAL.tsv and ScienceQA_TEST.tsv."),
    ],
    split: Annotated[
        list[str] | None,
        typer.Option(help="val or test; give it twice for both, as is the default."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """ScienceQA's questions with a picture, as VLMEvalKit's TSVs.

    Stopped, the same command goes on from where it was.

    Example: `hipp data scienceqa ./ScienceQA/data/scienceqa -o ~/LMUData`
    """
    from hipp_ext.evals.data.scienceqa import TABLES, write_scienceqa

    for file in write_scienceqa(
        source, out, split or tuple(TABLES), overwrite=overwrite, progress=sys.stderr.isatty()
    ):
        say(str(file))
