"""The command `vlmeval`: VLMEvalKit's flags for model folders, with an exit code that can be believed.

Exit codes: 0 every number was produced; 1 something failed during the evaluation; 2 bad usage or input, found before
anything was loaded; 130 stopped by ctrl-C.
"""

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Sequence

from hipp_ext.integrations.vlmevalkit import DTYPES, EvalRecord, evaluate_model, prepare

from hipp_ext.errors import HippError

EXAMPLES = """\
examples:
  vlmeval --data POPE --model ./pruned
  vlmeval --data POPE ScienceQA_TEST --model ./dense ./pruned --batch-size 16
  vlmeval --data mine=questions.tsv --model ./pruned --limit 100 --device cpu

The TSVs are VLMEvalKit's: <LMUData>/POPE.tsv and so on. A TSV of your own (NAME=PATH) is scored as multiple choice if
it has option columns A, B, ..., else as POPE. Answers are kept: a command that was stopped goes on where it stopped.
"""


def parser() -> argparse.ArgumentParser:
    # VLMEvalKit's users type `--data A B --model C D`. argparse reads such lists; typer, which the command `hipp`
    # uses, wants the flag repeated for each value.
    parser = argparse.ArgumentParser(
        prog="vlmeval",
        description="Score model folders on POPE and ScienceQA with VLMEvalKit's prompts and metrics, offline.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", nargs="+", action="extend", required=True, metavar="NAME",
        help="POPE, ScienceQA_VAL, ScienceQA_TEST (short: ScienceQA), or NAME=PATH")  # fmt: skip
    add("--model", nargs="+", action="extend", required=True, metavar="DIR", help="model folders, pruned or not")
    add("--limit", type=_positive, metavar="N", help="only the first N questions of each data set")
    add("--batch-size", type=_positive, default=8, metavar="N", help="questions at a time (default: 8)")
    add("--device", metavar="DEVICE", help="such as cuda:0 or cpu (default: the GPU if there is one)")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="default: auto, as stored")
    add("--work-dir", default="outputs", metavar="DIR", help="for answers and results (default: outputs)")
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
        print(f"\nInterrupted. The answers so far are kept under {args.work_dir}: the same command goes on from there.",
              file=sys.stderr)  # fmt: skip
        return 130


def _run(args: argparse.Namespace, command: str) -> int:
    _go_offline()
    try:
        job = prepare(
            args.model,
            args.data,
            lmu_data=args.lmu_data,
            work_dir=args.work_dir,
            limit=args.limit,
            batch_size=args.batch_size,
            device=args.device,
            dtype=args.dtype,
            progress=sys.stderr.isatty(),
            verbose=args.verbose,
            command=command,
        )
    except (HippError, OSError) as error:
        _complain(error, args.verbose)
        return 2
    for table in job.tables:
        if table.without_image:
            print(f"{table.name}: {table.without_image} rows without a picture are left out", file=sys.stderr)
        if table.official is False:
            print(f"{table.name}: {table.path} is not the published file; do not compare with published numbers",
                  file=sys.stderr)  # fmt: skip
    _quiet()
    records, failures = [], 0
    for folder in job.folders:
        try:
            for record in evaluate_model(job, folder):
                records.append(record)
        except Exception as error:  # one model's failure must not cost the numbers of the others
            failures += 1
            print(f"{folder}: ", end="", file=sys.stderr)
            _complain(error, args.verbose)
    if records:
        _print_table(records)
    return 1 if failures else 0


def _go_offline() -> None:
    """Everything is local; a typing error in a folder's name must not become a download."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "huggingface_hub.constants" in sys.modules:  # it has read the variable already
        vars(sys.modules["huggingface_hub.constants"])["HF_HUB_OFFLINE"] = True


def _quiet() -> None:
    """One progress bar, the one that counts questions; and none in a log file."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _complain(error: Exception, verbose: bool) -> None:
    if verbose:
        traceback.print_exception(error)
    kind = "" if isinstance(error, HippError) else f"{type(error).__name__}: "
    print(f"error: {kind}{error}", file=sys.stderr)
    if type(error).__name__ == "OutOfMemoryError":
        print("The answers so far are kept. Try again with a smaller --batch-size.", file=sys.stderr)


def _print_table(records: Sequence[EvalRecord]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="all numbers in percent, ± standard error")
    for heading in ("model", "data", "n", "metric", "VLMEvalKit's rule", "authors' rule", "yes", "unknown"):
        table.add_column(heading, justify="left" if heading in ("model", "data", "metric") else "right", no_wrap=True)
    for record in records:
        for row in _pope_rows(record) if "official" in record.metrics else _choice_rows(record):
            table.add_row(*(escape(cell) for cell in (record.model, record.data, *row)))
        table.add_section()
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a pipe has no width, and rich would cut the columns at 80
    console.print(table)
    for record in records:
        console.print(f"{record.model} on {record.data}: answers in {record.predictions}", soft_wrap=True, markup=False)


def _pope_rows(record: EvalRecord) -> list[list[str]]:
    rows = []
    for split, ours in record.metrics["vlmeval"].items():
        official = record.metrics["official"][split]
        for metric, label in (("f1", "F1"), ("accuracy", "accuracy")):
            rows.append([str(ours["n"]), f"{label} {split}", _number(ours, metric), _number(official, metric),
                         f"{official['yes_rate']:.1f}", f"{ours['unknown_rate']:.1f}"])  # fmt: skip
    return rows


def _choice_rows(record: EvalRecord) -> list[list[str]]:
    return [
        [str(own["n"]), f"accuracy {group}", _number(own, "accuracy"), "", "", f"{own['unknown_rate']:.1f}"]
        for group, own in record.metrics["accuracy"].items()
    ]


def _number(scores: dict, metric: str) -> str:
    error = scores[f"{metric}_se"]
    return f"{scores[metric]:.2f}" + ("" if error is None else f" ± {error:.2f}")
