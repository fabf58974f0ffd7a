"""`hipp bench`: the measured claims, one command each."""

from pathlib import Path
from typing import Annotated

import typer

from hipp_ext.cli.console import Device, Dtype, Overwrite, check_dtype
from hipp_ext.errors import DataError
from hipp_ext.files import require_new_file

bench_app = typer.Typer(
    no_args_is_help=True, help="The measured claims, as commands anyone can run."
)
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Write the figures to this JSON file.")
]
Save = Annotated[
    bool, typer.Option("--save", help="Write the result into the package's results folder.")
]
SearchQuestions = Annotated[
    tuple[int, int],
    typer.Option(min=8, metavar="N N", help="Of POPE and of ScienceQA, of the search split."),
]
Processes = Annotated[int | None, typer.Option(min=1, help="Default: one per core.")]
PRUNED, PLANNER, ROBUST, COMM = (
    "Pruned models",
    "Planner",
    "Robustness to attacks",
    "Gradient compression",
)


@bench_app.command("hosts", rich_help_panel=PRUNED)
def bench_hosts(repeats: Annotated[int, typer.Option(min=1)] = 3, save: Save = False) -> None:
    """Time and extra memory of pruning a 100M and a 1B Llama: hipp_ext.prune against torch-pruning's own pruner.

    The 1B shape needs about 10 GB of memory.
    """
    from hipp_ext.evals.studies.hosts import run

    run(repeats, save)


@bench_app.command("latency", rich_help_panel=PRUNED)
def bench_latency(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Model folders, dense first, or `testbed`."),
    ] = None,
    plan: Annotated[
        list[Path] | None,
        typer.Option(help="Also the first model pruned by this plan; may be repeated."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 1,
    tokens: Annotated[
        int, typer.Option(min=1, help="Prompt length of a model without pictures.")
    ] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate per run.")] = 33,
    repeats: Annotated[
        int, typer.Option(min=2, help="Runs that count, after two that do not.")
    ] = 9,
    seed: Annotated[int, typer.Option(help="Of pictures and random prompts.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    out: Out = None,
    overwrite: Overwrite = False,
    save: Save = False,
) -> None:
    """Time to the first token and per further token, peak memory and FLOPs: the first model against the others.

    Without a model: random weights of LLaVA-1.5's proportions and token counts, dense and uniformly pruned by 30%.

    Examples:

    `hipp bench latency ./llava-1.5-7b-hf ./pruned --dtype bfloat16 -o latency.json`

    `hipp bench latency testbed --plan plan.json`
    """
    import shlex
    import sys

    from hipp_ext.evals.studies.generation import Load
    from hipp_ext.evals.studies.latency import run
    from hipp_ext.testbed import WEIGHTS

    if plan and not models:
        raise DataError(
            "--plan needs the model that it is for: hipp bench latency MODEL --plan plan.json"
        )
    check_dtype(dtype)
    if out is not None:
        require_new_file(out, overwrite)
    load = Load(rows=rows, tokens=tokens, new_tokens=new_tokens, repeats=repeats, seed=seed)
    folders = {Path(m).resolve().name or m: WEIGHTS if m == "testbed" else m for m in models or ()}
    if len(folders) < len(models or ()):
        raise DataError(f"two folders of one name: {', '.join(models or ())}. Rename one")
    command = shlex.join(["hipp", *sys.argv[1:]])
    run(
        folders or None,
        plan or (),
        load,
        device=device,
        dtype=dtype,
        command=command,
        save=save,
        out=out,
    )


@bench_app.command("testbed", rich_help_panel=PRUNED)
def bench_testbed(save: Save = False) -> None:
    """Accuracy of the testbed's model, dense and uniformly pruned, on its test split."""
    from hipp_ext.evals.studies.testbed_table import run

    run(save)


@bench_app.command("compensation", rich_help_panel=PRUNED)
def bench_compensation(save: Save = False) -> None:
    """Accuracy of uniformly pruned testbed models, sliced and compensated, on the test split."""
    from hipp_ext.evals.studies.compensation import run

    run(save)


@bench_app.command("vlmeval", rich_help_panel=PRUNED)
def bench_vlmeval(repeats: Annotated[int, typer.Option(min=2)] = 5, save: Save = False) -> None:
    """What importing our integration adds to VLMEvalKit's own import, and the time of 200 POPE questions on the testbed."""
    from hipp_ext.evals.studies.vlmeval_cost import run

    run(repeats, save)


@bench_app.command("search", rich_help_panel=PLANNER)
def bench_search(
    out: Annotated[
        Path, typer.Option("--out", help="Finished jobs; an interrupted study goes on.")
    ] = Path("search"),
    seeds: Annotated[int, typer.Option(min=1)] = 5,
    evaluations: Annotated[int, typer.Option(min=12, help="Plans each method may evaluate.")] = 300,
    questions: SearchQuestions = (1024, 512),
    ablations: Annotated[
        bool, typer.Option("--ablations", help="Also the planner without its parts, two seeds.")
    ] = False,
    processes: Processes = None,
    save: Save = False,
) -> None:
    """The planner against allocators and search methods at equal evaluations, on the testbed's test split.

    Some three hours on two cores; a study that was stopped goes on.

    Examples:

    `hipp bench search --out search`

    `hipp bench search --questions 128 128 --ablations --out parts` asks about fewer pictures

    `hipp bench search --seeds 2 --evaluations 60 --questions 64 32 --out quick`
    """
    from hipp_ext.evals.studies.search.study import StudySize
    from hipp_ext.evals.studies.search.summary import run

    reduced = min(seeds, 2) if ablations else 0
    size = StudySize(
        seeds=seeds, ablation_seeds=reduced, evaluations=evaluations, questions=questions
    )
    run(size, out, processes=processes, save=save)


@bench_app.command("control", rich_help_panel=PLANNER)
def bench_control(
    out: Annotated[
        Path, typer.Option("--out", help="Finished fits; an interrupted study goes on.")
    ] = Path("control"),
    seeds: Annotated[int, typer.Option(min=1)] = 5,
    evaluations: Annotated[int, typer.Option(min=12, help="Plans each fit may evaluate.")] = 300,
    questions: SearchQuestions = (4096, 1024),
    test_questions: Annotated[
        tuple[int, int],
        typer.Option(
            min=8, metavar="N N", help="The same of the test split, to measure answers on."
        ),
    ] = (4800, 1600),
    processes: Processes = None,
    save: Save = False,
) -> None:
    """Does the preference steer? Fits, 66 wishes over the simplex put to each, and what their plans achieve on the test split.

    Some 90 minutes on two cores; a study that was stopped goes on with the next fit.

    Examples:

    `hipp bench control --out control`

    `hipp bench control --seeds 1 --evaluations 60 --questions 64 32 --test-questions 300 200 --out quick`
    """
    from hipp_ext.evals.studies.search.control import run
    from hipp_ext.evals.studies.search.study import StudySize

    size = StudySize(
        seeds=seeds, evaluations=evaluations, questions=questions, table_questions=test_questions
    )
    run(size, out, processes=processes, save=save)


@bench_app.command("fit", rich_help_panel=PLANNER)
def bench_fit(
    hidden: Annotated[
        int, typer.Option(min=256, help="Width of the language tower, a multiple of 256.")
    ] = 512,
    layers: Annotated[int, typer.Option(min=2, help="Its layers.")] = 4,
    questions: Annotated[int, typer.Option(min=1, help="Per task.")] = 24,
    steps: Annotated[int, typer.Option(min=1, help="Of the fit, 12 plans each.")] = 20,
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: float32.")
    ] = None,
    out: Out = None,
    overwrite: Overwrite = False,
    save: Save = False,
) -> None:
    """What a fit costs on random weights of LLaVA's shape: signals, evaluations, learning, surgery, memory, hours in all.

    Examples:

    `hipp bench fit`

    `hipp bench fit --hidden 4096 --layers 32 --questions 192 --dtype bfloat16` is LLaVA-1.5-7B, for a GPU
    """
    import shlex
    import sys

    from hipp_ext.evals.studies.fit_cost import FitCostSize, run
    from hipp_ext.planner import FitSettings

    check_dtype(dtype)
    if hidden % 256:
        raise DataError(
            f"--hidden {hidden}: a multiple of 256 is needed (heads are 128 wide, those of the vision tower 64)."
        )
    if out is not None:
        require_new_file(out, overwrite)
    size = FitCostSize(
        hidden=hidden, layers=layers, questions=questions, fit=FitSettings(steps=steps)
    )
    run(
        size,
        device=device,
        dtype=dtype,
        command=shlex.join(["hipp", *sys.argv[1:]]),
        save=save,
        out=out,
    )


@bench_app.command("query", rich_help_panel=PLANNER)
def bench_query(repeats: Annotated[int, typer.Option(min=1)] = 50, save: Save = False) -> None:
    """Time of one policy call for 32 layers, and of the whole of plan() on the testbed."""
    from hipp_ext.evals.studies.query import run

    run(repeats, save)


@bench_app.command("evaluation", rich_help_panel=PLANNER)
def bench_evaluation(repeats: Annotated[int, typer.Option(min=1)] = 7, save: Save = False) -> None:
    """Time of switching between plans and of evaluating one, against really pruned models."""
    from hipp_ext.evals.studies.evaluation_cost import run

    run(repeats, save)


@bench_app.command("kill", rich_help_panel=PLANNER)
def bench_kill(
    commands: Annotated[
        list[str] | None,
        typer.Argument(help="prune, fit, recover, finetune, vlmeval, pope; default: all."),
    ] = None,
    kills: Annotated[int, typer.Option(min=1, help="Of each command.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    save: Save = False,
) -> None:
    """Commands killed at random moments and given again, against undisturbed ones, byte for byte."""
    from hipp_ext.evals.studies.kill import COMMANDS, run

    run(kills, seed, tuple(commands or COMMANDS), save)


@bench_app.command("visual", rich_help_panel=PLANNER)
def bench_visual(repeats: Annotated[int, typer.Option(min=1)] = 7, save: Save = False) -> None:
    """Time of a VisualSensitivity pass against a plain sdpa forward on the same batch."""
    from hipp_ext.evals.studies.visual_cost import run

    run(repeats, save=save)


@bench_app.command("knockout", rich_help_panel=PLANNER)
def bench_knockout(save: Save = False) -> None:
    """Visual sensitivity against cutting text-to-picture attention, layer by layer."""
    from hipp_ext.evals.studies.knockout import run

    run(save)


@bench_app.command("synflow", rich_help_panel=PLANNER)
def bench_synflow(
    plans: Annotated[int, typer.Option(min=2, help="Per ratio.")] = 60, save: Save = False
) -> None:
    """Whether the synaptic-flow proxy foretells collapse at equal budget."""
    from hipp_ext.evals.studies.synflow import run

    run(plans, save)


@bench_app.command("robust", rich_help_panel=ROBUST)
def bench_robust(
    out: Annotated[
        Path, typer.Option("--out", help="Finished jobs; an interrupted study goes on.")
    ] = Path("robust"),
    data: Annotated[
        str, typer.Option(help="digits, svhn, cifar10, cifar100 or tiny-imagenet.")
    ] = "digits",
    root: Annotated[
        Path | None, typer.Option(help="Folder with the set's files; digits needs none.")
    ] = None,
    networks: Annotated[
        str,
        typer.Option(
            help="Default: small-resnet,small-vgg for digits, resnet18,vgg16_bn otherwise."
        ),
    ] = "",
    ratios: Annotated[
        str, typer.Option(help="Shares of channels removed in the uniform plan.")
    ] = "0.5,0.75,0.9",
    losses: Annotated[
        str, typer.Option(help="Of the fine-tuning: trades, pgd-at.")
    ] = "trades,pgd-at",
    arms: Annotated[str, typer.Option(help="Default: all of them.")] = "",
    seeds: Annotated[int, typer.Option(min=1)] = 20,
    dense: Annotated[
        int, typer.Option(min=0, help="Epochs of adversarial training before pruning.")
    ] = 25,
    tune: Annotated[int, typer.Option(min=0, help="Epochs of fine-tuning.")] = 15,
    test: Annotated[int, typer.Option(min=1, help="Test images that are attacked.")] = 300,
    autoattack: Annotated[
        bool, typer.Option("--autoattack", help="All four parts of AutoAttack, not the first two.")
    ] = False,
    save: Save = False,
) -> None:
    """Robust pruning: MRS against uniform, global L1, BN scale, Taylor and controls, at equal MACs and equal fine-tuning.

    An arm takes some 15 seconds on one core for digits; the whole study a day. `hipp bench robust --data cifar10 --root DIR`
    is for machines with a GPU.
    """
    from hipp_ext.evals.studies.robust import ARMS, ATTACKS, WHOLE_AUTOATTACK, Setting, run

    digits = data == "digits"
    chosen = networks or ("small-resnet,small-vgg" if digits else "resnet18,vgg16_bn")
    setting = Setting(
        data=data,
        root=str(root) if root else None,
        epsilon=0.1 if digits else 8 / 255,
        steps=5 if digits else 10,
        dense=dense,
        tune=tune,
        test=test,
        attacks=WHOLE_AUTOATTACK if autoattack else ATTACKS,
    )
    run(
        out,
        setting,
        chosen.split(","),
        [float(r) for r in ratios.split(",")],
        losses.split(","),
        seeds,
        arms.split(",") if arms else ARMS,
        save,
        typer.echo,
    )


@bench_app.command("mrs", rich_help_panel=ROBUST)
def bench_mrs(save: Save = False) -> None:
    """Cost of MRS on a ResNet-18, form by form, in epochs of adversarial training on the same images."""
    from hipp_ext.evals.studies.mrs_cost import run

    run(save)


@bench_app.command("autoattack", rich_help_panel=ROBUST)
def bench_autoattack(images: Annotated[int, typer.Option(min=1)] = 150, save: Save = False) -> None:
    """AutoAttack as `hipp robust evaluate` runs it against its authors' code, to be put on PYTHONPATH."""
    from hipp_ext.evals.studies.autoattack import run

    run(images, save=save)


@bench_app.command("attacked", rich_help_panel=ROBUST)
def bench_attacked(
    out: Annotated[
        Path, typer.Option("--out", help="Finished fits; an interrupted bench goes on.")
    ] = Path("attacked"),
    seeds: Annotated[int, typer.Option(min=2)] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Of each fit.")] = 12,
    questions: Annotated[int, typer.Option(min=8, help="Per task, in the fits.")] = 64,
    test: Annotated[int, typer.Option(min=8, help="Per task, of the test split.")] = 600,
    ratios: Annotated[str, typer.Option(help="Shares of the parameters removed.")] = "0.3,0.5",
    objectives: Annotated[
        str,
        typer.Option(
            help="pope first; adversarial: attacked once on the dense model; adaptive: anew for every plan."
        ),
    ] = "pope,adaptive",
    save: Save = False,
) -> None:
    """Planners fitted for POPE as it is and for POPE under attack, at equal sparsity, attacked anew on the test split."""
    from hipp_ext.evals.studies.attacked import run

    run(
        out,
        seeds,
        steps,
        questions,
        test,
        8 / 255,
        [float(r) for r in ratios.split(",")],
        save,
        typer.echo,
        objectives.split(","),
    )


@bench_app.command("comm", rich_help_panel=COMM)
def bench_comm(
    seeds: Annotated[int, typer.Option(min=2)] = 5,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Default: 300, on the testbed 60.")
    ] = None,
    testbed: Annotated[
        bool, typer.Option("--testbed", help="Recover a pruned testbed model instead of digits.")
    ] = False,
    save: Save = False,
) -> None:
    """Bytes and accuracy of LQ-SGD against fp32, fp16, PowerSGD, QSGD and top-k, workers with like and unlike data."""
    from hipp_ext.evals.studies import comm_accuracy, comm_testbed

    if testbed:
        comm_testbed.run(seeds, steps or 60, save)
    else:
        comm_accuracy.run(seeds, steps or 300, save)


@bench_app.command("links", rich_help_panel=COMM)
def bench_links(steps: Annotated[int, typer.Option(min=2)] = 12, save: Save = False) -> None:
    """Time per step over emulated links of 100 and 10 Mbit/s: LQ-SGD against torch's own hooks. Needs root."""
    from hipp_ext.evals.studies.comm_links import run

    run(steps=steps, save=save)


@bench_app.command("codec", rich_help_panel=COMM)
def bench_codec(repeats: Annotated[int, typer.Option(min=3)] = 50, save: Save = False) -> None:
    """Time to encode and decode a million values, against torch's fp16 cast."""
    from hipp_ext.evals.studies.comm_scale import run_codec

    run_codec(repeats, save)


@bench_app.command("scale", rich_help_panel=COMM)
def bench_scale(save: Save = False) -> None:
    """Simulated cost of a step for up to 1,024 workers and 7B parameters, and the bandwidth where compression stops paying."""
    from hipp_ext.evals.studies.comm_scale import run_scale

    run_scale(save)


@bench_app.command("inversion", rich_help_panel=COMM)
def bench_inversion(
    images: Annotated[int, typer.Option(min=2)] = 64,
    iterations: Annotated[int, typer.Option(min=1, help="Of each attack.")] = 100,
    network: Annotated[
        str, typer.Option(help="lenet (squared distance, L-BFGS) or cnn (cosine distance, Adam).")
    ] = "lenet",
    save: Save = False,
) -> None:
    """Rebuilding pictures from raw and compressed gradients: naive and adaptive attacks beside the mean image."""
    from hipp_ext.evals.studies.inversion import NETWORKS, run

    if network not in NETWORKS:
        raise DataError(f"--network {network}: one of {', '.join(NETWORKS)} is needed.")
    run(images, iterations, network, save)


@bench_app.command("recovery", rich_help_panel=COMM)
def bench_recovery(
    out: Annotated[
        Path, typer.Option("--out", help="For the models; finished parts are kept.")
    ] = Path("recovery"),
    save: Save = False,
) -> None:
    """Plan, prune 40%, recover on two processes with LQ-SGD and without, evaluate on the test and validation splits."""
    from hipp_ext.evals.studies.recovery import run

    run(out, save=save)
