"""Costs of models in percent of the dense one."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hipp_ext.evals.figures.style import INK, drawing, label, legend, marks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Shares = Mapping[str, Mapping[str, tuple[float, float, float]]]


def cost_figure(shares: Shares, *, models: Sequence[str] = ()) -> "Figure":
    """Costs of each model in percent of the first one, with the spread of measured quantities.

    Args:
        shares: (value, lower end, upper end) in percent, by quantity and model name.
        models: names of the models of all figures, the dense one first; they tell the colours.
    """
    shown = list(next(iter(shares.values())))
    looks = marks([*models, *shown])
    quantities = list(shares)[::-1]
    with drawing(0.9 + (0.16 * len(shown) + 0.12) * len(shares)) as figure:
        axes = figure.add_subplot()
        width = 0.8 / len(shown)
        for i, name in enumerate(shown):
            y = [q - (i - (len(shown) - 1) / 2) * width for q in range(len(quantities))]
            own = [shares[quantity][name] for quantity in quantities]
            errors = [
                [value - low or math.nan for value, low, _ in own],
                [high - value or math.nan for value, _, high in own],
            ]
            axes.barh(
                y,
                [value for value, _, _ in own],
                0.9 * width,
                xerr=errors,
                color=looks[name].colour,
                label=label(name),
                error_kw={"lw": 0.9, "ecolor": INK},
            )
        axes.axvline(100, color=INK, lw=0.8, ls=":")
        axes.set_yticks(range(len(quantities)), quantities)
        axes.set_xlabel(f"percent of {label(shown[0])}")
        axes.grid(axis="y", visible=False)
        legend(figure, axes)
    return figure
