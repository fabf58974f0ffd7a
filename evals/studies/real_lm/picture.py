"""Perplexity against the removed fraction, as a README can show it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hipp_ext.evals.studies.real_lm.methods import HIPP

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RED, INK, FAINT = "#c44e52", "#22262b", "#d9dde2"
WHOLE = (HIPP, "reconstructed")  # what the product does, drawn bold
# (method, side) -> label, colour and line style. The table has all methods and sides.
SHOWN = {
    ("uniform, Magnitude", "sliced"): ("uniform, magnitude", "#9aa0a6", "--"),
    ("torch-pruning", "sliced"): ("torch-pruning", "#9aa0a6", ":"),
    ("FLAP, with its bias", "sliced"): ("FLAP", "#dd8452", "-"),
    ("OWL", "sliced"): ("OWL", "#5b7fc7", "-"),
    ("ShortGPT", "sliced"): ("ShortGPT", "#55a868", "-"),
    ("uniform, WandaSP", "sliced"): ("Wanda-sp", "#8d7cc0", "-"),
    ("global threshold", "sliced"): ("global threshold", "#a0785a", "-"),
    ("FLAP adaptive", "reconstructed"): ("FLAP + least squares", "#dd8452", "--"),
    (HIPP, "sliced"): ("hipp-ext, plan alone", RED, "--"),
    WHOLE: ("hipp-ext", RED, "-"),
}
TOP = 100  # times the dense perplexity; what is above leaves the picture
GAP = 0.06  # least distance of two labels, of the picture's height

Line = tuple[str, str]  # method and side
Points = list[tuple[float, float, float]]  # removed [%], perplexity, its standard error


def picture(result: Mapping[str, Any]) -> "Figure":
    """Perplexity of the methods as they are published, and of hipp-ext with least squares.

    Args:
        result: what `summarize` returned.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    dense, methods = result["dense"], result["methods"]
    lines = {
        (name, side): [(0.0, dense, 0.0), *_points(methods[name][side])]
        for name, side in SHOWN
        if methods.get(name, {}).get(side)
    }
    style: dict[Any, Any] = {"font.size": 10.5, "text.color": INK, "axes.labelcolor": INK}
    style |= {"axes.edgecolor": "#9aa0a6", "xtick.color": "#5f6570", "ytick.color": "#5f6570"}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        figure = Figure(figsize=(7.8, 4.5), layout="constrained", facecolor="white")
        axes = figure.subplots()
        axes.set_title(
            "SmolLM2-135M pruned without any training", loc="left", fontsize=12, weight="bold"
        )
        axes.set_yscale("log")
        bottom, top = 0.8 * dense, TOP * dense
        axes.set_ylim(bottom, top)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
        axes.set_ylabel("perplexity (lower is better)")
        axes.set_xlabel("parameters removed from attention and FFN [%]")
        axes.grid(axis="y", color=FAINT, lw=0.7)
        axes.axhline(dense, color=INK, lw=0.9, ls=(0, (1, 2)))
        axes.annotate(
            f"dense {dense:.1f}",
            (0.99, dense),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="top",
            xytext=(0, -3),
            textcoords="offset points",
            fontsize=9,
        )
        for line, points in lines.items():
            _draw(axes, line, points)
        axes.set_xlim(0, max((p[-1][0] for p in lines.values()), default=40.0))
        _label(axes, lines)
    return figure


def _points(cells: Mapping[str, Any]) -> Points:
    return [
        (100 * float(ratio), cells[ratio]["mean"], cells[ratio]["se"] or 0.0)
        for ratio in sorted(cells, key=float)
    ]


def _draw(axes: Any, line: Line, points: Points) -> None:
    _, colour, dashes = SHOWN[line]
    bold = line == WHOLE
    x, y, errors = zip(*points, strict=True)
    axes.errorbar(
        x,
        y,
        yerr=errors,
        color=colour,
        ls=dashes,
        lw=3.2 if bold else 1.6,
        marker="o",
        ms=6.5 if bold else 3.5,
        capsize=2,
        zorder=4 if bold else 3,
    )


def _label(axes: Any, lines: Mapping[Line, Points]) -> None:
    """The name and the last perplexity of every line, at its end on the right."""
    ends = sorted((points[-1][1], line) for line, points in lines.items())
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform((0, value))[1]) for value, _ in ends]
    for (value, line), height in zip(ends, _apart(wanted), strict=True):
        text, colour, _ = SHOWN[line]
        axes.annotate(
            f"{text}  {value:,.0f}",
            (1.015, height),
            xycoords="axes fraction",
            va="center",
            color=colour,
            fontsize=13 if line == WHOLE else 10,
            weight="bold" if line == WHOLE else "normal",
            annotation_clip=False,
        )


def _apart(heights: Sequence[float]) -> list[float]:
    """Ascending heights, moved as little up as down to be GAP apart, and at most 1."""
    raised: list[float] = []
    for height in heights:
        raised.append(max(height, raised[-1] + GAP) if raised else height)
    lowered: list[float] = []
    for height in reversed(heights):
        lowered.append(min(height, lowered[-1] - GAP) if lowered else height)
    placed = [(up + down) / 2 for up, down in zip(raised, reversed(lowered), strict=True)]
    most = [1 - GAP * above for above in reversed(range(len(placed)))]
    return [min(height, limit) for height, limit in zip(placed, most, strict=True)]
