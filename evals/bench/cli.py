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


@bench_app.command("comm")
def bench_comm(
    seeds: Annotated[int, typer.Option(min=2)] = 5,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: 300, on the testbed 30.")] = None,
    testbed: Annotated[bool, typer.Option("--testbed", help="Recover a pruned testbed model instead of digits.")] = False,
    save: Save = False,
) -> None:
    """Bytes and accuracy of LQ-SGD against fp32, fp16, PowerSGD, QSGD and top-k, workers with like and unlike data."""
    from hipp_ext.evals.bench import comm_accuracy, comm_testbed

    if testbed:
        comm_testbed.run(seeds, steps or 30, save)
    else:
        comm_accuracy.run(seeds, steps or 300, save)


@bench_app.command("links")
def bench_links(steps: Annotated[int, typer.Option(min=2)] = 12, save: Save = False) -> None:
    """Time per step over emulated links of 100 and 10 Mbit/s: LQ-SGD against torch's own hooks. Needs root."""
    from hipp_ext.evals.bench.comm_links import run

    run(steps=steps, save=save)


@bench_app.command("codec")
def bench_codec(repeats: Annotated[int, typer.Option(min=3)] = 50, save: Save = False) -> None:
    """Time to encode and decode a million values, against torch's fp16 cast."""
    from hipp_ext.evals.bench.comm_scale import run_codec

    run_codec(repeats, save)


@bench_app.command("scale")
def bench_scale(save: Save = False) -> None:
    """Simulated cost of a step for up to 1,024 workers and 7B parameters, and the bandwidth where compression stops paying."""
    from hipp_ext.evals.bench.comm_scale import run_scale

    run_scale(save)


@bench_app.command("inversion")
def bench_inversion(
    images: Annotated[int, typer.Option(min=2)] = 64,
    iterations: Annotated[int, typer.Option(min=1, help="Of each attack.")] = 100,
    network: Annotated[str, typer.Option(help="lenet (squared distance, L-BFGS) or cnn (cosine distance, Adam).")] = "lenet",
    save: Save = False,
) -> None:
    """Rebuilding pictures from raw and compressed gradients: naive and adaptive attacks beside the mean image."""
    from hipp_ext.evals.bench.inversion import NETWORKS, run

    from hipp_ext.errors import DataError

    if network not in NETWORKS:
        raise DataError(f"--network {network}: one of {', '.join(NETWORKS)} is needed.")
    run(images, iterations, network, save)


@bench_app.command("recovery")
def bench_recovery(
    out: Annotated[Path, typer.Option("--out", help="For the models; finished parts are kept.")] = Path("recovery"),
    save: Save = False,
) -> None:
    """Plan, prune 40%, recover on two processes with LQ-SGD, evaluate on the testbed's test split."""
    from hipp_ext.evals.bench.recovery import run

    run(out, save=save)


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
