"""`hipp latency`: what a model and its pruned versions cost to run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hipp_ext.cli import output
from hipp_ext.cli.console import Device, Dtype, Overwrite, check_dtype, command_line, named_folders
from hipp_ext.errors import DataError
from hipp_ext.files import require_new_file

latency_app = typer.Typer()
Runtime = Literal["transformers", "llama.cpp", "vllm"]
ROUNDS = 3
QUICK_ROUNDS = 1
NEW_TOKENS, QUICK_NEW_TOKENS = 33, 9
REPEATS, QUICK_REPEATS = 9, 3


@latency_app.command("latency")
def latency(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Model folders, dense first, or `testbed`."),
    ],
    plan: Annotated[
        list[Path] | None,
        typer.Option(help="Also measure the first model pruned by this plan. Can be repeated."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of prompts in a batch.")] = 1,
    tokens: Annotated[
        int, typer.Option(min=1, help="Prompt length of a model without pictures.")
    ] = 512,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            min=2,
            help=f"Tokens to generate per run. Default: {NEW_TOKENS}; with --quick "
            f"{QUICK_NEW_TOKENS}.",
        ),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            min=2,
            help=f"Runs that count, after two warm-ups. Default: {REPEATS}; with --quick "
            f"{QUICK_REPEATS}, after one.",
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="A first look: fewer and shorter runs, which the result says."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Random seed of pictures and prompts.")] = 0,
    per_block: Annotated[
        bool,
        typer.Option(
            "--per-block",
            help="Measure how long the blocks of the first model take, for `hipp plan "
            "--latency-from`.",
        ),
    ] = False,
    runtime: Annotated[
        Runtime | None,
        typer.Option(
            metavar="NAME",
            help="Measure in transformers, llama.cpp or vllm, on text prompts, each model in a "
            "process of its own. Default: in this process, by transformers.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="Weights in --runtime: f32, f16, bf16 or q8_0."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads in --runtime. Default: all cores.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write the result to this JSON file.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: output.Json = False,
) -> None:
    """Measure first-token time, time per further token, peak memory and FLOPs.

    The first model is compared with the others. `hipp report` shows the file of `--out`.

    Examples:

    `hipp latency ./llava-1.5-7b-hf ./pruned --dtype bfloat16 -o latency.json`

    `hipp latency testbed --plan plan.json --quick`

    `hipp latency ./dense ./pruned --runtime llama.cpp --weights q8_0`

    `hipp latency ./dense --per-block --runtime llama.cpp -o latency-table.json`
    """
    output.only_json(as_json)
    from hipp_ext.evals.generation import Workload
    from hipp_ext.evals.latency import print_table, run
    from hipp_ext.evals.runtimes import Serving

    check_dtype(dtype)
    if out is not None:
        require_new_file(out, overwrite)
    new_tokens = new_tokens or (QUICK_NEW_TOKENS if quick else NEW_TOKENS)
    repeats = repeats or (QUICK_REPEATS if quick else REPEATS)
    folders = named_folders(models)
    if runtime or per_block:
        if plan or device or dtype or rows > 1:
            raise DataError(
                "--runtime and --per-block measure saved folders, one prompt at a time, on the CPU "
                "or where the runtime runs: omit --plan, --device, --dtype (see --weights), --rows."
            )
        rounds = min(QUICK_ROUNDS if quick else ROUNDS, repeats)
        serving = Serving(
            runtime=runtime or "transformers",
            weights=weights,
            tokens=tokens,
            new_tokens=new_tokens,
            repeats=repeats // rounds,
            rounds=rounds,
            threads=threads or len(os.sched_getaffinity(0)),
            seed=seed,
            quick=quick,
        )
        _in_runtime({n: Path(f) for n, f in folders.items()}, serving, per_block, out, as_json)
        return
    if weights or threads:
        raise DataError("--weights and --threads belong to --runtime or --per-block.")
    result = run(
        folders,
        plan or (),
        Workload(
            rows=rows,
            tokens=tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            warmup=1 if quick else 2,
            seed=seed,
            quick=quick,
        ),
        device=device,
        dtype=dtype,
        command=command_line(),
        out=out,
    )
    output.print_json(result) if as_json else print_table(result)


def _in_runtime(
    folders: Mapping[str, Path], serving: Any, per_block: bool, out: Path | None, as_json: bool
) -> None:
    """Measure in a runtime, and print and write what was found."""
    import json
    from dataclasses import asdict

    from hipp_ext.evals.measuring import describe
    from hipp_ext.evals.runtimes import measure_folders
    from hipp_ext.evals.runtimes.blocks import measure_blocks
    from hipp_ext.evals.runtimes.table import print_blocks, print_figures
    from hipp_ext.files import write_atomic

    if per_block:
        if len(folders) > 1:
            raise DataError("--per-block measures one model: give its folder alone.")
        table = measure_blocks(next(iter(folders.values())), serving)
        if out is not None:
            table.save(out)
        output.print_json(table.model_dump(mode="json")) if as_json else print_blocks(table)
        return
    found = measure_folders(folders, serving, show=output.shows_progress())
    values = {"serving": asdict(serving), "models": found}
    result = describe(command_line(), values, None if serving.runtime == "vllm" else "cpu")
    result["threads"] = serving.threads
    if out is not None:
        write_atomic(out, json.dumps(result, indent=1))
    output.print_json(result) if as_json else print_figures(found, serving)
