"""What `hipp doctor` finds, for people."""

from collections.abc import Iterator, Mapping
from typing import Any

import typer

from hipp_ext.cli.output import fitted
from hipp_ext.evals.text_table import print_table, text_table

MOST_ROWS = 10  # of those that are left out
MINUTE, HOUR, DAY, YEAR = 60, 3600, 86400, 86400 * 365
Found = Mapping[str, Any]


def print_findings(found: Found) -> None:
    """Print what `examine` returned, in at most 80 columns where names are short."""
    for line in _model_lines(found):
        typer.echo(fitted(line))
    print_table(_groups_table(found))
    for line in _whole_lines(found):
        typer.echo(fitted(line))
    if found["runtimes"]:
        print_table(_estimates_table(found))
        typer.echo("recovery: 400 steps of 8 rows; a teacher adds a forward pass and its weights")
        if any(_too_large(found, one) for one in found["estimates"]):
            typer.echo(
                "(!): more than there is; of a recovery, --gradient-checkpointing saves most"
            )
        print_table(_runtimes_table(found))
        for line in _reasons(found):
            typer.echo(fitted(line))
    for line in _host_lines(found):
        typer.echo(fitted(line))


def _model_lines(found: Found) -> Iterator[str]:
    yield f"{found['architecture']} in {found['folder']}"
    active = ""
    if found["active_parameters"] < 0.5 * found["parameters"]:
        active = f", {count(found['active_parameters'])} active for a token of text"
    yield (
        f"{count(found['parameters'])} parameters{active}, {found['dtype']}, "
        f"{size(found['weights_bytes'])} of weights"
    )
    if found["already_pruned"]:
        yield "it was saved by hipp-ext, with widths of its own"
    for names in found["tied"]:
        yield f"tied: {' = '.join(names)}"
    if found["weights_problem"]:
        yield f"weights: {found['weights_problem']}"
    if found["quantisation"]:
        yield (
            f"quantised ({found['quantisation']}): score, plan and prune the floating-point model, "
            "before it is quantised"
        )
    processor = found["processor"]
    yield f"{processor['kind']}: {processor['class'] or ''}{_because(processor)}"
    for one in found["calibration"]:
        yield from _calibration_lines(one)


def _because(processor: Mapping[str, str | None]) -> str:
    if processor["problem"] is None:
        return ""
    return f"{': ' if processor['class'] else ''}{processor['problem']}"


def _calibration_lines(one: Found) -> Iterator[str]:
    read = one["usable"] + len(one["left_out"])
    whole = f" ({one['rows']:,} in the file)" if one["rows"] not in (None, read) else ""
    if one["problem"]:
        yield f"calibration: {one['file']} cannot be used: {one['problem']}"
    else:
        yield f"calibration: {one['usable']} of {read} rows of {one['file']} can be used{whole}"
    if one["usable"]:
        kinds = ", ".join(f"{rows} {kind}" for kind, rows in one["kinds"].items())
        yield (
            f"  {kinds}; {one['tokens']:,} tokens, {one['longest']:,} in the longest row; "
            f"pictures found: {one['pictures']}"
        )
    if one["unread_pictures"]:
        yield f"  rows whose pictures are missing or damaged: {one['unread_pictures']}"
    for line in one["left_out"][:MOST_ROWS]:
        yield f"  left out, {line}"
    if (more := len(one["left_out"]) - MOST_ROWS) > 0:
        yield f"  and {more} more, which --json lists"


def _groups_table(found: Found) -> Any:
    rows = []
    for tower in found["towers"]:
        for kind in tower["kinds"]:
            units = sorted({kind["least_units"], kind["most_units"]})
            rows.append(
                (
                    tower["tower"],
                    f"{'-'.join(map(str, units))} {kind['unit']}",
                    kind["groups"],
                    count(kind["parameters"]),
                    f"{100 * kind['parameters'] / found['parameters']:.1f}",
                )
            )
    columns = ("tower", "units of a group", "groups", "parameters", "% of all")
    return text_table(columns, rows, left=2, title="what can go")


def _whole_lines(found: Found) -> Iterator[str]:
    for tower in found["towers"]:
        if tower["refused"]:
            yield f"{tower['tower']} cannot be pruned: {tower['refused']}"
        for line in tower["left_whole"]:
            yield f"{tower['tower']}, left whole: {line}"
    if any(t["left_whole"] for t in found["towers"] if t["tower"] == "language"):
        yield "the other blocks can be pruned with --partial report"
    if found["prunable_parameters"]:
        yield (
            f"largest --pruning-ratio: {found['largest_pruning_ratio']:.2f} of the "
            f"{count(found['prunable_parameters'])} in the language tower"
        )


def _estimates_table(found: Found) -> Any:
    rows = [
        (f"hipp {one['command']}", petaflop(one["flops"]), duration(one["seconds"]))
        + (f"{size(one['bytes'])}{' (!)' * _too_large(found, one)}",)
        for one in found["estimates"]
    ]
    title = (
        f"estimates for {found['rows']} rows of {found['tokens']} tokens, {found['device']} with "
        f"{size(found['device_bytes'])}, {found['flops_per_second'] / 1e12:.3g} TFLOP/s"
    )
    return text_table(("", "PFLOP", "time", "memory"), rows, title=title)


def _too_large(found: Found, one: Found) -> bool:
    return one["bytes"] > found["device_bytes"]


def _runtimes_table(found: Found) -> Any:
    rows = [
        (runtime, *("no" if reasons[shape] else "yes" for shape in ("free", "stock")))
        for runtime, reasons in found["runtimes"].items()
    ]
    columns = ("", "any plan", "--serve stock")
    return text_table(columns, rows, left=3, title="who will serve the pruned language tower")


def _reasons(found: Found) -> Iterator[str]:
    for runtime, reasons in found["runtimes"].items():
        for reason in dict.fromkeys((*reasons["free"], *reasons["stock"])):
            yield f"{runtime}: {reason}"


def _host_lines(found: Found) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in found["installed"].items())
    yield f"installed: {versions}"
    for extra, line in found["missing_extras"].items():
        yield f"not installed: {extra}: {line}"


def count(number: int) -> str:
    """A number of parameters in words of three digits: 135M, 6.74B."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def size(number: int) -> str:
    """Bytes as MiB, or from 1 GiB on as GiB."""
    return f"{number / 2**30:.3g} GiB" if number >= 2**30 else f"{number / 2**20:.3g} MiB"


def petaflop(number: int) -> str:
    return f"{number / 1e15:.3g}"


def duration(seconds: float) -> str:
    """A time in its largest unit."""
    for unit, name in ((YEAR, "years"), (DAY, "days"), (HOUR, "h"), (MINUTE, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(1, round(seconds))} s"
