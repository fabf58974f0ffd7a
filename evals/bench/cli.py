"""`hipp bench`: the measured claims, one command each."""

from pathlib import Path
from typing import Annotated

import typer

bench_app = typer.Typer(no_args_is_help=True, help="The measured claims, as commands anyone can run.")
Save = Annotated[bool, typer.Option("--save", help="Write the result into the package's results folder.")]


@bench_app.command("hosts")
def bench_hosts(repeats: Annotated[int, typer.Option(min=1)] = 3, save: Save = False) -> None:
    """Time and extra memory of pruning a 100M and a 1B Llama: hipp_ext.prune against torch-pruning's own pruner.

    The 1B shape needs about 10 GB of memory.
    """
    from hipp_ext.evals.bench.hosts import run

    run(repeats, save)


@bench_app.command("testbed")
def bench_testbed(save: Save = False) -> None:
    """Accuracy of the testbed's model, dense and uniformly pruned, on its test split."""
    from hipp_ext.evals.bench.testbed_table import run

    run(save)


@bench_app.command("compensation")
def bench_compensation(save: Save = False) -> None:
    """Accuracy of uniformly pruned testbed models, sliced and compensated, on the test split."""
    from hipp_ext.evals.bench.compensation import run

    run(save)


@bench_app.command("visual")
def bench_visual(repeats: Annotated[int, typer.Option(min=1)] = 7, save: Save = False) -> None:
    """Time of a VisualSensitivity pass against a plain sdpa forward on the same batch."""
    from hipp_ext.evals.bench.visual_cost import run

    run(repeats, save=save)


@bench_app.command("query")
def bench_query(repeats: Annotated[int, typer.Option(min=1)] = 50, save: Save = False) -> None:
    """Time of one policy call for 32 layers, and of the whole of plan() on the testbed."""
    from hipp_ext.evals.bench.query import run

    run(repeats, save)


@bench_app.command("evaluation")
def bench_evaluation(repeats: Annotated[int, typer.Option(min=1)] = 7, save: Save = False) -> None:
    """Time of switching between plans and of evaluating one, against really pruned models."""
    from hipp_ext.evals.bench.evaluation_cost import run

    run(repeats, save)


@bench_app.command("knockout")
def bench_knockout(save: Save = False) -> None:
    """Visual sensitivity against cutting text-to-picture attention, layer by layer."""
    from hipp_ext.evals.bench.knockout import run

    run(save)


@bench_app.command("synflow")
def bench_synflow(plans: Annotated[int, typer.Option(min=2, help="Per ratio.")] = 60, save: Save = False) -> None:
    """Whether the synaptic-flow proxy foretells collapse at equal budget."""
    from hipp_ext.evals.bench.synflow import run

    run(plans, save)


@bench_app.command("kill")
def bench_kill(
    kills: Annotated[int, typer.Option(min=1)] = 50,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    save: Save = False,
) -> None:
    """A fit killed at random moments and resumed, against an undisturbed one."""
    from hipp_ext.evals.bench.kill import run

    run(kills, seed, save)


@bench_app.command("robust")
def bench_robust(
    out: Annotated[Path, typer.Option("--out", help="Finished jobs; an interrupted study goes on.")] = Path("robust"),
    data: Annotated[str, typer.Option(help="digits, svhn, cifar10, cifar100 or tiny-imagenet.")] = "digits",
    root: Annotated[Path | None, typer.Option(help="Folder with the set's files; digits needs none.")] = None,
    networks: Annotated[
        str, typer.Option(help="Default: small-resnet,small-vgg for digits, resnet18,vgg16_bn otherwise.")
    ] = "",
    ratios: Annotated[str, typer.Option(help="Shares of channels removed in the uniform plan.")] = "0.5,0.75,0.9",
    losses: Annotated[str, typer.Option(help="Of the fine-tuning: trades, pgd-at.")] = "trades,pgd-at",
    arms: Annotated[str, typer.Option(help="Default: all of them.")] = "",
    seeds: Annotated[int, typer.Option(min=1)] = 20,
    dense: Annotated[int, typer.Option(min=0, help="Epochs of adversarial training before pruning.")] = 25,
    tune: Annotated[int, typer.Option(min=0, help="Epochs of fine-tuning.")] = 15,
    test: Annotated[int, typer.Option(min=1, help="Test images that are attacked.")] = 300,
    save: Save = False,
) -> None:
    """Robust pruning: MRS against uniform, global L1, BN scale, Taylor and controls, at equal MACs and equal fine-tuning.

    An arm takes some 15 seconds on one core for digits; the whole study a day. `hipp bench robust --data cifar10 --root DIR`
    is for machines with a GPU.
    """
    from hipp_ext.evals.bench.robust import ARMS, Setting, run

    digits = data == "digits"
    chosen = networks or ("small-resnet,small-vgg" if digits else "resnet18,vgg16_bn")
    setting = Setting(data=data, root=str(root) if root else None, epsilon=0.1 if digits else 8 / 255,
                      steps=5 if digits else 10, dense=dense, tune=tune, test=test)  # fmt: skip
    run(out, setting, chosen.split(","), [float(r) for r in ratios.split(",")], losses.split(","), seeds,
        arms.split(",") if arms else ARMS, save, typer.echo)  # fmt: skip


@bench_app.command("mrs")
def bench_mrs(save: Save = False) -> None:
    """Cost of MRS on a ResNet-18, form by form, in epochs of adversarial training on the same images."""
    from hipp_ext.evals.bench.mrs_cost import run

    run(save)


@bench_app.command("attacked")
def bench_attacked(
    out: Annotated[Path, typer.Option("--out", help="Finished fits; an interrupted bench goes on.")] = Path("attacked"),
    seeds: Annotated[int, typer.Option(min=2)] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Of each fit.")] = 12,
    questions: Annotated[int, typer.Option(min=8, help="Per task, in the fits.")] = 64,
    test: Annotated[int, typer.Option(min=8, help="Per task, of the test split.")] = 200,
    objectives: Annotated[
        str, typer.Option(help="pope first; adversarial: attacked once on the dense model; adaptive: anew for every plan.")
    ] = "pope,adaptive",
    save: Save = False,
) -> None:
    """Planners fitted for POPE as it is and for POPE under attack, at equal sparsity, attacked anew on the test split."""
    from hipp_ext.evals.bench.attacked import run

    run(out, seeds, steps, questions, test, 8 / 255, 0.3, save, typer.echo, objectives.split(","))


@bench_app.command("search")
def bench_search(
    out: Annotated[Path, typer.Option("--out", help="Finished jobs; an interrupted study goes on.")] = Path("search"),
    seeds: Annotated[int, typer.Option(min=1)] = 5,
    evaluations: Annotated[int, typer.Option(min=12, help="Plans each method may evaluate.")] = 300,
    questions: Annotated[int, typer.Option(min=8, help="Per task, of the search split.")] = 128,
    processes: Annotated[int | None, typer.Option(min=1, help="Default: one per core.")] = None,
    save: Save = False,
) -> None:
    """The planner against allocators and search methods at equal evaluations, on the testbed's test split. An hour.

    Examples:

    `hipp bench search --out search`

    `hipp bench search --seeds 2 --evaluations 60 --questions 32 --out quick`
    """
    from hipp_ext.evals.bench.search.study import StudySize
    from hipp_ext.evals.bench.search.summary import run

    size = StudySize(seeds=seeds, ablation_seeds=min(seeds, 3), evaluations=evaluations, questions=questions)
    run(size, out, processes=processes, save=save)
