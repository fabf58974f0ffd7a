"""How much worse each pruned model is, by data set and part, with confidence intervals."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hipp_ext.evals.figures.style import INK, drawing, label, legend, marks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Interval = tuple[float, float, float]
_ROW, _NAME = 0.15, 0.36  # heights of a model, and of the name of a row above them [inches]


def changes_figure(
    rows: Mapping[str, Mapping[str, Interval]], dense: str, *, models: Sequence[str] = ()
) -> "Figure":
    """One row per data set or part, one point per model: the difference from the dense model.

    Args:
        rows: (difference, lower end, upper end) in percentage points, by row and model.
        dense: name of the dense model.
        models: names of the models of all figures, the dense one first; they tell the colours.
    """
    shown = list(dict.fromkeys(name for own in rows.values() for name in own))
    looks = marks([*models, dense, *shown])
    step = _ROW / (len(shown) * _ROW + _NAME)  # of a row, which is 1 high
    with drawing(0.9 + len(rows) * _ROW / step) as figure:
        axes = figure.add_subplot()
        axes.axvline(0, color=INK, lw=0.9, ls=":")
        for i, name in enumerate(shown):
            there = [(place, own[name]) for place, own in enumerate(rows.values()) if name in own]
            axes.errorbar(
                [value for _, (value, _, _) in there],
                [place + 1 - (len(shown) - i - 0.1) * step for place, _ in there],
                xerr=[
                    [value - low for _, (value, low, _) in there],
                    [high - value for _, (value, _, high) in there],
                ],
                fmt=looks[name].shape,
                ms=5,
                color=looks[name].colour,
                elinewidth=1.4,
                label=label(name),
            )
        # Names above their rows: beside them they would leave a phone no room for the points.
        for place, name in enumerate(rows):
            start = axes.get_yaxis_transform()  # the left edge, and the height of the row
            axes.text(0, place + 0.7 * _NAME * step / _ROW, label(name), transform=start)
        axes.set_yticks([])
        axes.set_ylim(len(rows) + 0.2 * step, 0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"points above {label(dense)}")
        axes.grid(axis="y", visible=False)
        legend(figure, axes)
    return figure
