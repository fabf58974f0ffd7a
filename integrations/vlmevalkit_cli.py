"""The command `vlmeval`: VLMEvalKit's options for model folders, with reliable exit codes.

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
from hipp_ext.integrations.vlmevalkit_table import print_records

if TYPE_CHECKING:
    from hipp_ext.integrations.vlmevalkit_run import Job

EXAMPLES = """\
examples:
  vlmeval --data POPE --model ./pruned
  vlmeval --data POPE ScienceQA_TEST --model ./dense ./pruned --batch-size 16
  vlmeval --data mine=questions.tsv --model ./pruned --limit 100 --device cpu

The TSVs are VLMEvalKit's: <LMUData>/POPE.tsv and so on. Your own TSV (NAME=PATH) is scored as
multiple choice if it has option columns A, B, ..., and as POPE otherwise. Answers are kept: run a
stopped command again to continue. Results are in <work-dir>/<name of the model's folder>-<hash>;
`hipp compare` finds them without the hash.
"""
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    # VLMEvalKit's users type `--data A B --model C D`. argparse reads such lists; typer, which
    # `hipp` uses, needs the option again for each value.
    parser = argparse.ArgumentParser(
        prog="vlmeval",
        description="Evaluate model folders on POPE, MME, ScienceQA and others with VLMEvalKit's "
        "prompts and metrics, offline.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--data",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME",
        help="POPE, RePOPE, AMBER, HallusionBench, MME, ScienceQA_VAL, ScienceQA_TEST (short: "
        "ScienceQA), or NAME=PATH",
    )
    add(
        "--model",
        dest="model_dirs",
        nargs="+",
        action="extend",
        required=True,
        metavar="DIR",
        help="model folders, pruned or not",
    )
    add("--limit", type=_positive, metavar="N", help="only the first N questions of each data set")
    add(
        "--batch-size",
        type=_positive,
        default=8,
        metavar="N",
        help="questions per batch (default: 8)",
    )
    add(
        "--device",
        metavar="DEVICE",
        help="such as cuda:0 or cpu (default: the GPU if there is one)",
    )
    add(
        "--dtype",
        choices=_DTYPES,
        default="auto",
        help="dtype of the weights (default: auto, as stored)",
    )
    add(
        "--work-dir",
        default="outputs",
        metavar="DIR",
        help="folder of answers and results (default: outputs)",
    )
    add("--lmu-data", metavar="DIR", help="folder of the TSVs (default: $LMUData, else ~/LMUData)")
    add("--verbose", action="store_true", help="print every answer, and the full trace of an error")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        args = parser().parse_args(argv)
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
    for folder in job.folders:
        try:
            for record in evaluate_model(job, folder):
                records.append(record)
        except Exception as error:  # the other models are still evaluated
            failures.append(error)
            print(f"{folder}: ", end="", file=sys.stderr)
            _print_error(error, args.verbose)
    if records:
        print_records(records)
    refused = all(isinstance(error, OutputBusyError) for error in failures)
    return (2 if refused else 1) if failures else 0


def _prepare(args: argparse.Namespace, command: str) -> "Job":
    """The checked job; slow imports happen here too."""
    import transformers

    from hipp_ext.integrations.vlmevalkit_host import import_vlmeval
    from hipp_ext.integrations.vlmevalkit_run import prepare

    job = prepare(**vars(args), progress=sys.stderr.isatty(), command=command)
    import_vlmeval()
    # The bar of questions stays.
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return job


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
