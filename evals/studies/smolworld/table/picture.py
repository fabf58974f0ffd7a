"""Hallucination and multiple choice against the pruning_ratio, dense beside them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {
    "POPE accuracy overall": "POPE accuracy [%]",  # F1 of nothing but yes is 67
    "CHAIR_i": "CHAIR_i [%], lower is better",
    "choice": "multiple choice [%]",
}
ROWS = {"none": "pruned", "reconstruct": "reconstructed", "distil": "recovered"}
RED, INK = "#c44e52", "#22262b"
COLOURS = ("#4c72b0", "#55a868", "#8172b3", "#ccb974", "#64b5cd", "#937860", "#8c8c8c", "#da8bc3")
MARKERS = "os"  # of the first methods with these colours, and of those that follow
SIZE = (4.0, 2.7)  # of a panel [inches]
APART = 0.25  # points of one ratio stand side by side [%]


def picture(result: Mapping[str, Any]) -> "Figure":
    """A row of panels for each repair; a line for every method, points where it has one ratio.

    Args:
        result: what `writing.write_table` writes.
    """
    from matplotlib.figure import Figure

    entries: Sequence[Mapping[str, Any]] = result["cells"]
    repairs = [r for r in ROWS if any(e["repair"] == r for e in entries)] or ["none"]
    width, height = SIZE
    figure = Figure(
        figsize=(width * len(PANELS), height * len(repairs) + 0.8), layout="constrained"
    )
    grid = figure.subplots(len(repairs), len(PANELS), squeeze=False)
    colours = _colours(entries)
    for axes_row, repair in zip(grid, repairs, strict=True):
        own = [e for e in entries if e["repair"] == repair]
        for axes, (rate, title) in zip(axes_row, PANELS.items(), strict=True):
            _panel(axes, own, rate, colours, result["dense"])
            axes.set_title(f"{ROWS[repair]}: {title}", loc="left", fontsize=9, weight="bold")
    handles: dict[str, Any] = {}
    for axes in grid.flatten():
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8
        )
    return figure


def _panel(
    axes: Any,
    entries: Sequence[Mapping[str, Any]],
    rate: str,
    colours: Mapping[str, str],
    dense: Mapping[str, Sequence[float]],
) -> None:
    for number, (method, colour) in enumerate(colours.items()):
        own = [e for e in entries if e["method"] == method and e["corner"] == "middle"]
        own = sorted(own, key=lambda e: e["ratio"])
        if own:
            x = [100 * e["ratio"] + APART * (number - len(colours) / 2) for e in own]
            y, error = zip(*(e["rates"][rate] for e in own), strict=True)
            thick = 2.0 if method.startswith("hipp") else 1.2
            marker = MARKERS[number >= len(COLOURS)]
            axes.errorbar(x, y, error, color=colour, marker=marker, ms=3.5, lw=thick, label=method)
    if rate in dense:
        axes.axhline(dense[rate][0], color=INK, lw=0.8, ls="--", label="dense")
    axes.set_xlabel("removed [%]", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _colours(entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Method -> colour: shades of red for hipp, others in the order of the table."""
    methods = list(dict.fromkeys(e["method"] for e in entries))
    reds = iter((RED, "#8f2d31", "#e39a9c"))
    rest = iter(COLOURS * 3)
    return {m: next(reds if m.startswith("hipp") else rest, INK) for m in methods}
