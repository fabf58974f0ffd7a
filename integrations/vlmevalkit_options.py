"""The options of the command `vlmeval`. Nothing slow is imported here."""

import argparse
import os
from collections.abc import Sequence

from hipp_ext.integrations.vlmevalkit_flags import add_flags, judge

EXAMPLES = """\
examples:
  vlmeval --data POPE --model ./pruned
  vlmeval --data POPE ScienceQA_TEST --model ./dense ./pruned --batch-size 16
  vlmeval --data mine=questions.tsv --model ./pruned --limit 100 --device cpu
  vlmeval --data POPE --base-url http://localhost:8000/v1 --api-nproc 16

The TSVs are VLMEvalKit's: <LMUData>/POPE.tsv and so on. Your own TSV (NAME=PATH) is scored as
multiple choice if it has option columns A, B, ..., and as POPE otherwise. Answers are kept: run a
stopped command again to continue. Results are in <work-dir>/<name of the model's folder>-<hash>;
`hipp compare` finds them without the hash. VLMEvalKit's own files are in <work-dir>/<name>. Other
flags of VLMEvalKit are accepted, or refused with the reason: docs/vlmevalkit.md.
"""
BATCH_SIZE = 8
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; those that do not belong together are refused."""
    own = parser()
    args = own.parse_args(argv)
    if args.base_url is None and not args.model:
        own.error("the following arguments are required: --model (or --base-url, for a server)")
    for name in ("batch_size", "device", "dtype"):
        if args.base_url is not None and getattr(args, name) is not None:
            option = name.replace("_", "-")
            own.error(f"--{option} is for model folders; a server decides that itself")
    if args.base_url is None and args.api_key_env is not None:
        own.error("--api-key-env is for a server: --base-url is missing")
    return args


def parser() -> argparse.ArgumentParser:
    # VLMEvalKit's users type `--data A B --model C D`. argparse reads such lists; typer, which
    # `hipp` uses, needs the option again for each value.
    parser = argparse.ArgumentParser(
        prog="vlmeval",
        description="Evaluate model folders, or models on a server, on POPE, MME, ScienceQA and "
        "others with VLMEvalKit's prompts and metrics, offline.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
        nargs="+",
        action="extend",
        metavar="DIR",
        help="model folders, pruned or not; with --base-url, names of models on the server",
    )
    add(
        "--mode",
        choices=("all", "infer", "eval"),
        default="all",
        help="all (default); infer only asks; eval only scores answers of earlier runs",
    )
    add("--limit", type=_positive, metavar="N", help="only the first N questions of each data set")
    add(
        "--work-dir",
        default=os.environ.get("MMEVAL_ROOT") or "outputs",
        metavar="DIR",
        help="folder of answers and results (default: $MMEVAL_ROOT, else outputs)",
    )
    add("--lmu-data", metavar="DIR", help="folder of the TSVs (default: $LMUData, else ~/LMUData)")
    add("--verbose", action="store_true", help="print every answer, and the full trace of an error")
    add("--reuse", action="store_true", help="no effect: valid answers are always used again")
    add(
        "--judge",
        type=judge,
        metavar="exact_matching",
        help="the only judge: scoring asks no model",
    )
    _add_folder_options(parser.add_argument_group("model folders"))
    _add_server_options(parser.add_argument_group("a server with OpenAI's API"))
    add_flags(parser)
    return parser


def _add_folder_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch-size",
        type=_positive,
        metavar="N",
        help=f"questions per batch (default: {BATCH_SIZE})",
    )
    group.add_argument(
        "--device",
        metavar="DEVICE",
        help="such as cuda:0 or cpu (default: the GPU if there is one)",
    )
    group.add_argument(
        "--dtype", choices=_DTYPES, help="dtype of the weights (default: auto, as stored)"
    )


def _add_server_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--base-url",
        metavar="URL",
        help="its address, such as http://localhost:8000/v1; without --model, the only model that "
        "it serves",
    )
    group.add_argument(
        "--api-key-env",
        metavar="NAME",
        help="environment variable that holds the key (default: no key)",
    )
    group.add_argument(
        "--api-nproc",
        "--nproc",
        "--parallel",
        dest="parallel",
        type=_positive,
        default=4,
        metavar="N",
        help="requests at the same time (default: 4)",
    )
    group.add_argument(
        "--retry",
        type=_natural,
        default=6,
        metavar="N",
        help="further attempts when it is busy or fails (default: 6)",
    )
    group.add_argument(
        "--timeout",
        type=_positive,
        default=600,
        metavar="S",
        help="longest wait for an answer, in seconds (default: 600)",
    )


def _positive(text: str) -> int:
    return _whole(text, 1)


def _natural(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} is not {least} or more")
    return number
