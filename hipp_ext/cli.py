"""The command `hipp`: thin wrappers over the library, one function per command."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hipp_ext.errors import HippError
from hipp_ext.evals.bench.cli import bench_app

app = typer.Typer(
    name="hipp", no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    help="Pruning plans for vision-language models: state a preference, get a smaller model that still sees.",
)  # fmt: skip
testbed_app = typer.Typer(no_args_is_help=True, help="The built-in tiny LLaVA and its picture world.")
data_app = typer.Typer(no_args_is_help=True, help="Benchmark files for `vlmeval`, built from local copies of the data.")
app.add_typer(testbed_app, name="testbed")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A transformers model folder, or `testbed`.")]
Utility = Annotated[float, typer.Option("--utility", "-u", help="Weight of task accuracy.")]
Robustness = Annotated[float, typer.Option("--robustness", "-r", help="Weight of not hallucinating objects.")]
Compression = Annotated[float, typer.Option("--compression", "-c", help="Weight of removing parameters.")]
Ratio = Annotated[
    float | None, typer.Option("--pruning-ratio", help="Share of parameters to remove; default: the policy decides.")
]
RoundTo = Annotated[int | None, typer.Option("--round-to", min=1, help="Keep widths that are multiples of this.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...; default: the GPU if there is one.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: as stored.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output path.")]


def main() -> None:
    """Entry point: exit code 0 on success, 2 for bad input, 130 on ctrl-C, 1 for anything else."""
    _quiet_transformers()
    try:
        app(standalone_mode=True)
    except HippError as error:
        typer.secho(f"hipp: {error}", fg="red", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.secho("hipp: interrupted. What was finished is kept; the same command goes on from there.", err=True)
        sys.exit(130)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything the demo makes.")] = Path("demo"),
    steps: Annotated[int, typer.Option(min=1, help="Policy updates of the fit, 12 plans each.")] = 20,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions per data set in the final evaluation; default: all.")
    ] = None,
) -> None:
    """Fit, plan for three preferences, prune, evaluate with VLMEvalKit, and report; all on the testbed.

    Minutes on two cores; a second run resumes.

    Example: `hipp demo --out demo`
    """
    from hipp_ext.evals.demo import DemoSize, run_demo
    from hipp_ext.planner.fit import FitSettings

    run_demo(out, DemoSize(settings=FitSettings(steps=steps), limit=limit), say=typer.echo)


@app.command()
def plan(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The plan file to write.")] = Path("plan.json"),
    utility: Utility = 0.4,
    robustness: Robustness = 0.4,
    compression: Compression = 0.2,
    pruning_ratio: Ratio = None,
    round_to: RoundTo = None,
    planner: Annotated[
        Path | None, typer.Option("--planner", help="A folder written by `hipp fit`; default: untrained.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the pruning plan for a preference.

    Examples:

    `hipp plan ./llava-1.5-7b-hf -u 0.4 -r 0.4 -c 0.2 --round-to 64 -o plan.json`

    `hipp plan testbed --pruning-ratio 0.3 -r 1 -u 0 -c 0 --planner ./planner`
    """
    from hipp_ext.budget import Bounds, check_ratio
    from hipp_ext.files import require_new
    from hipp_ext.planner import HiPPPlanner
    from hipp_ext.preference import Preference

    require_new(out, overwrite)
    wanted = Preference(utility, robustness, compression)
    maker = HiPPPlanner.load(planner) if planner else HiPPPlanner(wanted)
    if pruning_ratio is not None:
        check_ratio(pruning_ratio)
        maker.pruning_ratio = pruning_ratio
    if round_to is not None:
        maker.bounds = Bounds(round_to=round_to, min_keep=maker.bounds.min_keep)
    loaded, processor = _load(model, device, dtype)
    made = maker.plan(loaded, processor=processor, preference=wanted, say=_say)
    made.save(out, overwrite)
    _say(f"{out}: removes {100 * made.pruning_ratio:.2f}% of the prunable parameters")
    _print_plan(made)


@app.command()
def fit(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the planner.")],
    pope: Annotated[Path | None, typer.Option(help="POPE-like TSV to search on; default: the testbed's.")] = None,
    scienceqa: Annotated[Path | None, typer.Option(help="Multiple-choice TSV to search on; default: the testbed's.")] = None,
    questions: Annotated[int, typer.Option(min=1, help="Questions per task.")] = 192,
    steps: Annotated[int, typer.Option(min=0, help="Policy updates, 12 plans each.")] = 20,
    pruning_ratio: Ratio = None,
    round_to: RoundTo = None,
    cost: Annotated[str, typer.Option(help="What compression is rewarded for: parameters, flops or latency.")] = "parameters",
    seed: Annotated[int, typer.Option(help="Of preferences and noise.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Train the planner's policy by plan-level GRPO. Interrupted, it goes on from where it was.

    Examples:

    `hipp fit testbed --out planner`

    `hipp fit ./llava-1.5-7b-hf --pope POPE_train.tsv --scienceqa ScienceQA_VAL.tsv --out planner`

    `torchrun --nproc-per-node 8 -m hipp_ext fit ./llava-1.5-7b-hf ... --out planner` spreads the plans over 8 GPUs
    """
    from hipp_ext.budget import Bounds
    from hipp_ext.files import require_new
    from hipp_ext.planner import FitSettings, HiPPPlanner
    from hipp_ext.planner.evaluation import Workers
    from hipp_ext.preference import Preference

    workers = Workers.join()
    require_new(out, overwrite)
    if workers.count > 1 and device is None:
        device = _own_device()
    loaded, processor = _load(model, device, dtype)
    evaluator = _evaluator(loaded, processor, pope, scienceqa, questions, out)
    maker = HiPPPlanner(Preference(1, 1, 1), pruning_ratio=pruning_ratio, bounds=Bounds(round_to=round_to or 1))
    running = out.with_name(out.name + ".fit")
    say = _say if workers.leads else None
    chosen: Any = cost
    result = maker.fit(loaded, evaluator, FitSettings(steps=steps, seed=seed), folder=running, cost=chosen,
                       processor=processor, say=say)  # fmt: skip
    if workers.leads:
        maker.save(out, overwrite=overwrite)
        _say(
            f"{out}: {result.evaluations} plans evaluated, hypervolume {result.hypervolume:.4f}; progress is kept in {running}"
        )


@app.command()
def front(
    planner: Annotated[Path, typer.Argument(metavar="PLANNER", help="A folder written by `hipp fit`.")],
    utility: Annotated[float | None, typer.Option("--utility", "-u", help="With -r and -c: what is wanted.")] = None,
    robustness: Annotated[float | None, typer.Option("--robustness", "-r")] = None,
    compression: Annotated[float | None, typer.Option("--compression", "-c")] = None,
    pruning_ratio: Ratio = None,
    model: Annotated[
        str | None, typer.Option(help="The fitted model: measures the policy's plan where the fit did not.")
    ] = None,
    pope: Annotated[Path | None, typer.Option(help="The POPE-like TSV of the fit; default: the testbed's.")] = None,
    scienceqa: Annotated[Path | None, typer.Option(help="The multiple-choice TSV of the fit.")] = None,
    questions: Annotated[int, typer.Option(min=1, help="Questions per task, as in the fit.")] = 192,
    picture: Annotated[Path | None, typer.Option(help="Draw the front to this PNG.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the front to this file.")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """The plans that no other evaluated plan dominates, with standard errors; and two answers to a preference.

    Examples:

    `hipp front planner --picture front.png`

    `hipp front planner -u 0.2 -r 0.6 -c 0.2 --model ./llava-1.5-7b-hf --pope POPE_train.tsv --scienceqa ScienceQA_VAL.tsv`
    """
    from hipp_ext.budget import check_ratio
    from hipp_ext.evals.front import answer, print_front, write_json, write_picture
    from hipp_ext.planner import HiPPPlanner
    from hipp_ext.preference import Preference

    fitted = HiPPPlanner.load(planner)
    if pruning_ratio is not None:
        check_ratio(pruning_ratio)
        fitted.pruning_ratio = pruning_ratio
    choices = None
    if (utility, robustness, compression) != (None, None, None):
        wanted = Preference(utility or 0.0, robustness or 0.0, compression or 0.0)
        loaded, processor = _load(model, device, dtype) if model else (None, None)
        evaluator = _evaluator(loaded, processor, pope, scienceqa, questions, planner) if model else None
        choices = answer(fitted, wanted, loaded, evaluator)
    print_front(fitted, choices)
    if picture:
        write_picture(fitted, choices, picture)
    if json_file:
        write_json(fitted, json_file)


@app.command()
def prune(
    model: ModelArgument,
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the small model.")],
    compensate: Annotated[
        bool, typer.Option("--compensate", help="Fit what stays to calibration activations; no training, needs the processor.")
    ] = False,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, ...; default: cpu; to compensate, the GPU if there is one.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Cut a model down to a plan and save it with its processor.

    Examples:

    `hipp prune ./llava-1.5-7b-hf plan.json -o ./pruned` then `vlmeval --data POPE --model ./pruned`

    `hipp prune ./llava-1.5-7b-hf plan.json -o ./compensated --compensate`
    """
    from hipp_ext.checkpoint import save_pruned
    from hipp_ext.files import require_new
    from hipp_ext.plan import PruningPlan
    from hipp_ext.surgery import prune as cut

    made = PruningPlan.load(plan_file)
    require_new(out, overwrite)
    loaded, processor = _load(model, device if compensate or device else "cpu")
    before = sum(p.numel() for p in loaded.parameters())
    small = cut(loaded, made, inplace=True, compensate=compensate, processor=processor)
    save_pruned(small, out, processor, overwrite=overwrite)
    after = sum(p.numel() for p in small.parameters())
    _say(f"{out}: {before / 1e6:.2f}M -> {after / 1e6:.2f}M parameters ({100 * (1 - after / before):.1f}% less in all)")


@app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="What `hipp demo`, `vlmeval`, `hipp fit` or `hipp bench latency` wrote; models."),
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the page; default: the first DIR.")] = None,
) -> None:
    """One self-contained page, report.html, and PNGs: front, units kept, POPE by split, disagreements, cost, how it was made.

    Every DIR adds what lies in it: results of `vlmeval` and its answers, model folders (plans and sizes), a planner (front,
    visual sensitivity), latency.json. The models of all DIRs stand in one report, the dense one first.

    Examples:

    `hipp report demo`

    `hipp report outputs ./dense ./pruned planner latency.json -o report`
    """
    from hipp_ext.evals.report import write_report

    _say(str(write_report(folders, out)))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A folder or predictions.jsonl that `vlmeval` wrote.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another, of the model that is compared with A.")],
    data: Annotated[
        Path | None, typer.Option(help="The TSV that was asked, for predictions without a questions.jsonl beside them.")
    ] = None,
    level: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write all numbers here.")] = None,
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
    from hipp_ext.files import require_new

    if json_file is not None:
        require_new(json_file, overwrite)
    rows = run(a, b, tsv=data, level=level, seed=seed)
    _say(f"A: {a}\nB: {b}")
    _print_wide(comparison_table(rows, level))
    if json_file is not None:
        _write_json(json_file, {"a": str(a), "b": str(b), "level": level, "seed": seed, "comparisons": plain(rows)})


@app.command()
def chair(
    model: ModelArgument,
    n: Annotated[int, typer.Option("--n", min=2, help="Pictures to describe.")] = 200,
    annotations: Annotated[
        Path | None, typer.Option(help="COCO instance file, such as instances_val2014.json; default: the testbed's scenes.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures that the annotations name.")] = None,
    captions: Annotated[
        Path | None, typer.Option(help="COCO caption file; what it names counts as being in the picture.")
    ] = None,
    synonyms: Annotated[
        Path | None, typer.Option(help="Other names of the objects: JSON, or lines `person, girl, boy`; default: plurals only.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the model is asked; default: a brief description.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest caption, for COCO.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the sample of pictures.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 8,
    work_dir: Annotated[Path, typer.Option(help="For captions and scores; a stopped run goes on there.")] = Path("outputs"),
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """CHAIR: let a model describe pictures, and count the objects it names that are not there.

    Examples:

    `hipp chair testbed --n 200`

    `hipp chair ./pruned --annotations instances_val2014.json --captions captions_val2014.json --images val2014`
    """
    from hipp_ext.errors import DataError
    from hipp_ext.evals.captions import PROMPT, chair_table, coco_task, measure_chair, scenes_task

    _check_dtype(dtype)
    if (annotations is None) != (images is None):
        raise DataError("Give both --annotations and --images, or neither (then the testbed's scenes are described).")
    if annotations is None and (captions or synonyms or prompt):
        raise DataError("--captions, --synonyms and --prompt go with --annotations; the testbed has its own.")
    if annotations is None or images is None:
        task = scenes_task(n)
    else:
        task = coco_task(annotations, images, n, captions=captions, synonyms=synonyms, prompt=prompt or PROMPT,
                         max_new_tokens=max_new_tokens, seed=seed)  # fmt: skip
    scores, file = measure_chair(_folder(model), task, work_dir=work_dir, batch_size=batch_size, device=device, dtype=dtype,
                                 progress=sys.stderr.isatty())  # fmt: skip
    _print_wide(chair_table([(model, scores)]))
    _say(f"captions and scores: {file.parent}")


@app.command("tasks-path")
def tasks_path() -> None:
    """Print the folder of the lm-eval tasks hipp_pope, hipp_scienceqa and hipp_scienceqa_val.

    Example: `lm_eval --include_path $(hipp tasks-path) --tasks hipp_pope ...`, for one of lm-eval's own models
    """
    from hipp_ext.integrations.lm_eval import tasks_path as path

    _say(str(path()))


@app.command("lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
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
    out: Annotated[Path, typer.Option("--out", "-o", help="The TSV to write, such as $LMUData/POPE.tsv.")],
    coco_annotations: Annotated[
        Path | None, typer.Option(help="Build new questions from a COCO instance file, such as instances_val2014.json.")
    ] = None,
    published: Annotated[
        Path | None, typer.Option(help="Convert the authors' questions: folder of coco_pope_random.json and so on.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Pictures to ask about, with --coco-annotations.")] = 500,
    objects: Annotated[int, typer.Option(min=1, help="Present objects, and absent ones per split, for each picture.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the sample and of the random objects.")] = 0,
    ending: Annotated[str, typer.Option(help="Put after each question.")] = "Please answer yes or no.",
    overwrite: Overwrite = False,
) -> None:
    """POPE as a TSV: random, popular and adversarial questions from annotations, or the published ones.

    Stopped, the same command goes on from where it was.

    Examples:

    `hipp data pope --coco-annotations instances_val2014.json --images val2014 -o ~/LMUData/POPE.tsv`

    `hipp data pope --published POPE/output/coco --images val2014 -o ~/LMUData/POPE.tsv`
    """
    from hipp_ext.errors import DataError
    from hipp_ext.evals.data.pope import pope_from_annotations, pope_from_published, write_pope

    if coco_annotations is not None and published is None:
        questions, source = pope_from_annotations(coco_annotations, n_images=n, per_image=objects, seed=seed)
    elif published is not None and coco_annotations is None:
        questions, source = pope_from_published(published)
    else:
        raise DataError("Give one of --coco-annotations (new questions) and --published (the authors' questions).")
    write_pope(out, questions, images, source, ending=ending, overwrite=overwrite, progress=sys.stderr.isatty())
    splits = (f"{split} {sum(split in q.splits for q in questions)}" for split in ("random", "popular", "adversarial"))
    _say(f"{out}: {len(questions)} questions about {len({q.image for q in questions})} pictures ({', '.join(splits)})")


@data_app.command("scienceqa")
def data_scienceqa(
    source: Annotated[
        Path, typer.Argument(help="Folder with problems.json, pid_splits.json and images, or with the hub's parquet files.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for ScienceQA_VAL.tsv and ScienceQA_TEST.tsv.")],
    split: Annotated[list[str] | None, typer.Option(help="val or test; give it twice for both, as is the default.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """ScienceQA's questions with a picture, as VLMEvalKit's TSVs.

    Stopped, the same command goes on from where it was.

    Example: `hipp data scienceqa ./ScienceQA/data/scienceqa -o ~/LMUData`
    """
    from hipp_ext.evals.data.scienceqa import TABLES, write_scienceqa

    for file in write_scienceqa(source, out, split or tuple(TABLES), overwrite=overwrite, progress=sys.stderr.isatty()):
        _say(str(file))


@testbed_app.command("train")
def testbed_train(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the model.")],
    seed: Annotated[int, typer.Option(help="Of weights and data order.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train the tiny LLaVA again from nothing; minutes on two cores.

    Example: `hipp testbed train --out my-testbed`
    """
    from hipp_ext import testbed

    testbed.train(out, seed=seed, overwrite=overwrite)
    _say(str(out))


@testbed_app.command("export")
def testbed_export(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for SPLIT/POPE.tsv and SPLIT/ScienceQA_TEST.tsv.")],
    model: Annotated[Path | None, typer.Option(help="Also save the dense model to this folder.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the testbed's questions as VLMEvalKit TSVs: calibration, search, validation and test, disjoint.

    Example: `hipp testbed export -o data --model dense` then `vlmeval --data POPE --model dense --lmu-data data/test`
    """
    from hipp_ext import testbed
    from hipp_ext.checkpoint import save_pruned
    from hipp_ext.files import require_new

    if model is not None:
        require_new(model, overwrite)
    testbed.export(out, overwrite=overwrite)
    _say(str(out))
    if model is not None:
        loaded, processor = testbed.load()
        _say(str(save_pruned(loaded, model, processor, overwrite=overwrite)))


def _quiet_transformers() -> None:
    """Its bars for loading and saving say nothing about our progress. The variable is read when transformers is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _say(line: str) -> None:
    typer.echo(line)


def _load(model: str, device: str | None = "cpu", dtype: str | None = None) -> tuple[Any, Any]:
    """Model and processor of a folder; device None: the GPU if there is one."""
    import torch

    from hipp_ext.calibration import find_processor
    from hipp_ext.checkpoint import load_pruned
    from hipp_ext.evals.predictions import resolve_device

    _check_dtype(dtype)
    loaded = load_pruned(_folder(model), device=resolve_device(device), dtype=getattr(torch, dtype) if dtype else None)
    return loaded, find_processor(loaded)


def _folder(model: str) -> str:
    if model != "testbed":
        return model
    from hipp_ext.testbed import WEIGHTS

    return str(WEIGHTS)


def _check_dtype(dtype: str | None) -> None:
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise HippError(f"--dtype {dtype}: float32, bfloat16 or float16 is needed.")


def _own_device() -> str:
    """The GPU that `torchrun` meant for this process, if there are GPUs."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _evaluator(model: Any, processor: Any, pope: Path | None, scienceqa: Path | None, n: int, out: Path) -> Any:
    from hipp_ext.errors import DataError
    from hipp_ext.evals.demo import search_evaluator
    from hipp_ext.evals.evaluator import Evaluator
    from hipp_ext.evals.questions import table_questions
    from hipp_ext.evals.tables import read_table

    if pope is None and scienceqa is None:
        return search_evaluator(model, processor, n)
    if pope is None or scienceqa is None:
        raise DataError("Give both --pope and --scienceqa, or neither (then the testbed's questions are used).")
    images = out.with_name(out.name + ".images")
    tasks = [table_questions(read_table(path, images))[:n] for path in (pope, scienceqa)]
    return Evaluator(model, processor, *tasks)


def _print_plan(made: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("group", "keep", "of", "")
    for g in made.groups:
        table.add_row(g.name, str(g.keep), str(g.width), "█" * round(20 * g.keep / g.width))
    Console().print(table)


def _print_wide(table: Any) -> None:
    """A rich table in full: where the terminal is too narrow, its lines wrap, and no number is cut."""
    from rich.console import Console

    console = Console()
    width = console.measure(table, options=console.options.update(width=1000)).maximum
    (console if console.width >= width else Console(width=width, soft_wrap=True)).print(table)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    import json

    from hipp_ext.files import write_atomic

    write_atomic(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
