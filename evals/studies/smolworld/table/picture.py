"""Pictures of the table: rates against the pruning_ratio, and what repairs bring at one ratio."""

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
INK = "#22262b"
REDS = ("#c44e52", "#8f2d31", "#e39a9c", "#f0803c", "#a8326f")  # of hipp-ext's own methods
COLOURS = ("#4c72b0", "#55a868", "#8172b3", "#ccb974", "#64b5cd", "#937860", "#8c8c8c", "#da8bc3")
SIZE = (4.0, 2.7)  # of a panel [inches]
APART = 0.25  # points of one ratio stand side by side [%]
SILENT = 50.0  # captions without a name [%] above which CHAIR_i says nothing
STAGES = {"none": ("o", "#b9bec6"), "reconstruct": ("s", "#4c72b0"), "distil": ("D", "#c44e52")}
STAGED = ("POPE accuracy overall", "choice")


def ratios_picture(result: Mapping[str, Any]) -> "Figure":
    """A row of panels for each repair of several ratios; a line for every method.

    Methods of one ratio are points. CHAIR_i of models whose captions name hardly anything is left
    out.

    Args:
        result: what `writing.write_table` writes.
    """
    from matplotlib.figure import Figure

    entries: Sequence[Mapping[str, Any]] = result["cells"]
    ratios = {repair: {e["ratio"] for e in entries if e["repair"] == repair} for repair in ROWS}
    repairs = [repair for repair, own in ratios.items() if len(own) > 1] or ["none"]
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


def repairs_picture(result: Mapping[str, Any], ratio: float) -> "Figure":
    """A line for every method: pruned, reconstructed and recovered at one ratio, dense beside them.

    Args:
        result: what `writing.write_table` writes.
        ratio: the pruning_ratio.
    """
    from matplotlib.figure import Figure

    own = [e for e in result["cells"] if e["ratio"] == ratio and e["corner"] == "middle"]
    methods = list(dict.fromkeys(e["method"] for e in own))[::-1]
    width, height = SIZE
    figure = Figure(
        figsize=(width * len(STAGED) + 1, max(height, 0.27 * len(methods) + 1)),
        layout="constrained",
    )
    panels = figure.subplots(1, len(STAGED), sharey=True, squeeze=False)[0]
    for axes, rate in zip(panels, STAGED, strict=True):
        for repair, (marker, colour) in STAGES.items():
            some = [e for e in own if e["repair"] == repair]
            if some:
                x, error = zip(*(e["rates"][rate] for e in some), strict=True)
                y = [methods.index(e["method"]) for e in some]
                style = {"color": colour, "marker": marker, "ms": 5, "ls": "", "elinewidth": 1}
                axes.errorbar(x, y, xerr=error, label=ROWS[repair], **style)
        if rate in result["dense"]:
            axes.axvline(result["dense"][rate][0], color=INK, lw=0.8, ls="--", label="dense")
        axes.set_title(f"{ratio:.0%}: {PANELS[rate]}", loc="left", fontsize=9, weight="bold")
        axes.set_yticks(range(len(methods)), methods)
        axes.grid(axis="y", lw=0.4)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
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
        own = [e for e in own if rate != "CHAIR_i" or e["rates"]["silent"][0] <= SILENT]
        own = sorted(own, key=lambda e: e["ratio"])
        if own:
            x = [100 * e["ratio"] + APART * (number - len(colours) / 2) for e in own]
            y, error = zip(*(e["rates"][rate] for e in own), strict=True)
            thick, marker = (2.0, "s") if _own(method) else (1.2, "o")
            axes.errorbar(x, y, error, color=colour, marker=marker, ms=3.5, lw=thick, label=method)
    if rate in dense:
        axes.axhline(dense[rate][0], color=INK, lw=0.8, ls="--", label="dense")
    axes.set_xlabel("removed [%]", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _colours(entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Method -> colour: shades of red for our own, others in the order of the table."""
    methods = list(dict.fromkeys(e["method"] for e in entries))
    reds, rest = iter(REDS), iter(COLOURS)
    return {m: next(reds if _own(m) else rest, INK) for m in methods}


def _own(method: str) -> bool:
    return method.startswith(("hipp", "sensitivity"))
