"""The command `vlmeval`: VLMEvalKit's options for model folders and servers, with reliable exit
codes.

Exit codes: 0 all numbers were computed; 1 an error during the evaluation; 2 wrong usage or input,
found before a model was loaded, or another process is evaluating the same; 130 stopped by ctrl-C.
"""

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hipp_ext.errors import HippError, OutputBusyError
from hipp_ext.integrations.vlmevalkit_interrupt import INTERRUPTED, prompt_interrupt
from hipp_ext.integrations.vlmevalkit_options import BATCH_SIZE, parsed
from hipp_ext.integrations.vlmevalkit_table import print_records

if TYPE_CHECKING:
    from hipp_ext.evals.served import ServedVLM
    from hipp_ext.integrations.vlmevalkit_job import Job


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        args = parsed(argv)
    except SystemExit as stop:  # argparse has printed its message or its help
        return stop.code if isinstance(stop.code, int) else 2
    try:
        return _run(args, shlex.join(["vlmeval", *(sys.argv[1:] if argv is None else argv)]))
    except KeyboardInterrupt:
        print(
            f"\nInterrupted. The answers are kept in {args.work_dir}: run the same command again "
            "to continue.",
            file=sys.stderr,
        )
        return INTERRUPTED


def _run(args: argparse.Namespace, command: str) -> int:
    _go_offline()
    try:
        with prompt_interrupt():
            job = _prepare(args, command)
    except (HippError, OSError) as error:
        _print_error(error, args.verbose)
        return 2
    except Exception as error:  # the import of VLMEvalKit failed in this environment
        _print_error(error, args.verbose)
        return 1
    for table in job.tables:
        if table.without_image:
            print(
                f"{table.name}: {table.without_image} rows without a picture are left out",
                file=sys.stderr,
            )
        if table.official is False:
            print(
                f"{table.name}: {table.path} is not the published file; do not compare the "
                "results with published numbers",
                file=sys.stderr,
            )
    from hipp_ext.integrations.vlmevalkit_run import evaluate_model

    records, failures = [], []
    for model in job.models:
        try:
            for record in evaluate_model(job, model):
                records.append(record)
        except Exception as error:  # the other models are still evaluated
            failures.append(error)
            print(f"{model.source}: ", end="", file=sys.stderr)
            _print_error(error, args.verbose)
    if records:
        print_records(records)
    refused = all(isinstance(error, OutputBusyError) for error in failures)
    return (2 if refused else 1) if failures else 0


def _prepare(args: argparse.Namespace, command: str) -> "Job":
    """The checked job; slow imports happen here too."""
    import transformers

    from hipp_ext.integrations.vlmevalkit_host import import_vlmeval
    from hipp_ext.integrations.vlmevalkit_job import prepare

    job = prepare(
        args.model if args.base_url is None else _served(args),
        args.data,
        args.lmu_data,
        args.work_dir,
        limit=args.limit,
        batch_size=args.batch_size or BATCH_SIZE,
        device=args.device,
        dtype=args.dtype,
        mode=args.mode,
        progress=sys.stderr.isatty(),
        verbose=args.verbose,
        command=command,
    )
    import_vlmeval()
    # The bar of questions stays.
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return job


def _served(args: argparse.Namespace) -> "list[ServedVLM]":
    """The models of --base-url; the server is asked which ones it has."""
    from hipp_ext.evals.served import ServedVLM

    return [
        ServedVLM(
            args.base_url,
            name,
            api_key_env=args.api_key_env,
            parallel=args.parallel,
            retries=args.retry,
            timeout=args.timeout,
        )
        for name in dict.fromkeys(args.model or [None])
    ]


def _go_offline() -> None:
    """Prevent downloads, so that a misspelt folder name is not looked up on the hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "huggingface_hub.constants" in sys.modules:  # it has read the variable already
        vars(sys.modules["huggingface_hub.constants"])["HF_HUB_OFFLINE"] = True


def _print_error(error: Exception, verbose: bool) -> None:
    if verbose:
        traceback.print_exception(error)
    kind = "" if isinstance(error, HippError) else f"{type(error).__name__}: "
    print(f"error: {kind}{error}", file=sys.stderr)
    if type(error).__name__ == "OutOfMemoryError":
        print("The answers are kept. Try again with a smaller --batch-size.", file=sys.stderr)
