"""The output of `vlmeval`: one table if it fits, else one for each model and data set."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from hipp_ext.integrations.vlmevalkit_run import EvalRecord

_TITLE = "all numbers in percent, ± standard error"
_NUMBERS = ("n", "metric", "VLMEvalKit's rule", "authors' rule", "yes", "unknown")


def print_records(records: Sequence["EvalRecord"], console: "Console | None" = None) -> None:
    """Print the numbers of the records, what n counts, and the files of the answers.

    Args:
        records: records of one command.
        console: console for the output. Default: standard output, with any width if it is not a
            terminal.
    """
    from rich.console import Console

    console = console or Console()
    names = _names(records)
    wide = _wide(records, names)
    needed = console.measure(wide, options=console.options.update(width=10_000)).maximum
    if console.width >= needed or not console.is_terminal:
        Console(file=console.file, width=max(console.width, needed)).print(wide)
    else:
        for record, name in zip(records, names, strict=True):
            console.print(*_block(record, name), sep="\n")
    for line in _counts(records):
        console.print(_text(line))
    for record, name in zip(records, names, strict=True):
        console.print(
            _text(f"{name} on {record.data}: answers in {record.predictions}"), soft_wrap=True
        )


def _text(text: str) -> Any:
    """Text that rich prints as it is; in a string it would interpret `[red]` and `:dog:`."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def _names(records: Sequence["EvalRecord"]) -> list[str]:
    """Names of the models, as they were typed; equal names get the first digits of their hash."""
    hashes: dict[str, set[str]] = {}
    for record in records:
        hashes.setdefault(record.model, set()).add(record.model_hash)
    return [
        r.model if len(hashes[r.model]) == 1 else f"{r.model}-{r.model_hash[:8]}" for r in records
    ]


def _wide(records: Sequence["EvalRecord"], names: Sequence[str]) -> "RenderableType":
    from rich.table import Table

    table = Table(title=_TITLE)
    for heading in ("model", "data", *_NUMBERS):
        table.add_column(
            heading,
            justify="left" if heading in ("model", "data", "metric") else "right",
            no_wrap=True,
        )
    for record, name in zip(records, names, strict=True):
        for row in _rows(record):
            table.add_row(*map(_text, (name, record.data, *row)))
        table.add_section()
    return table


def _block(record: "EvalRecord", name: str) -> tuple["RenderableType", ...]:
    from rich import box
    from rich.table import Table

    rows = _rows(record)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for place, heading in enumerate(_NUMBERS):
        if any(row[place] for row in rows):
            table.add_column(
                heading, justify="left" if heading == "metric" else "right", overflow="fold"
            )
    for row in rows:
        table.add_row(
            *(_text(cell) for place, cell in enumerate(row) if any(other[place] for other in rows))
        )
    return _text(f"{name} on {record.data} ({_TITLE})"), table, ""


def _counts(records: Sequence["EvalRecord"]) -> list[str]:
    """Explains, once per data set, why POPE's n is larger than the number of questions asked."""
    lines = {}
    for record in records:
        counted = (
            record.metrics["official"]["overall"]["n"] if "official" in record.metrics else record.n
        )
        if counted != record.n:
            lines[record.data, record.n] = (
                f"{record.data}: {record.n} questions were asked; n is {counted} because, as in "
                "VLMEvalKit, a question counts once for each split that it belongs to. (`hipp "
                "compare` counts each question once.)"
            )
    return list(lines.values())


def _rows(record: "EvalRecord") -> list[list[str]]:
    return _pope_rows(record) if "official" in record.metrics else _choice_rows(record)


def _pope_rows(record: "EvalRecord") -> list[list[str]]:
    rows = []
    for split, ours in record.metrics["vlmeval"].items():
        official = record.metrics["official"][split]
        for metric, label in (("f1", "F1"), ("accuracy", "accuracy")):
            rows.append(
                [
                    str(ours["n"]),
                    f"{label} {split}",
                    _number(ours, metric),
                    _number(official, metric),
                    f"{official['yes_rate']:.1f}",
                    f"{ours['unknown_rate']:.1f}",
                ]
            )
    return rows


def _choice_rows(record: "EvalRecord") -> list[list[str]]:
    return [
        [
            str(own["n"]),
            f"accuracy {group}",
            _number(own, "accuracy"),
            "",
            "",
            f"{own['unknown_rate']:.1f}",
        ]
        for group, own in record.metrics["accuracy"].items()
    ]


def _number(scores: dict, metric: str) -> str:
    error = scores[f"{metric}_se"]
    return f"{scores[metric]:.2f}" + ("" if error is None else f" ± {error:.2f}")
