"""Perplexity against speed, one panel per runtime."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hipp_ext.evals.studies.serving.versions import DENSE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"free": "C0", "free, any width": "C4", "uniform": "C1", "layers": "C2"}
# Offsets of the labels from their points [points]: shapes of like perplexity stay readable.
LABELS = {"free": (3, -10), "free, any width": (-4, 9), "uniform": (-16, 5), "layers": (4, -9)}
MARKERS = {"free": "o", "free, any width": "x", "uniform": "s", "layers": "^"}


def picture(result: Mapping[str, Any]) -> "Figure":
    """Speed of further tokens over dense, and perplexity; a line joins the ratios of a shape."""
    from matplotlib import pyplot as plt

    settings, facts = result["settings"], result["models"]
    figure, axes = plt.subplots(
        1, len(settings), figsize=(3.6 * len(settings), 3.6), sharey=True, squeeze=False
    )
    for axis, (title, setting) in zip(axes[0], settings.items(), strict=True):
        for shape, color in COLORS.items():
            points = [
                (row["decode_speedup"]["median"], facts[name]["perplexity"], name)
                for name, row in setting["models"].items()
                if name != DENSE and name.split(" ", 1)[1] == shape
            ]
            if points:
                x, y, names = zip(*points, strict=True)
                axis.plot(x, y, color=color, marker=MARKERS[shape], label=shape, lw=1)
                style: Any = {"fontsize": 7, "color": color, "textcoords": "offset points"}
                for *place, name in points:
                    axis.annotate(name.split()[0], place, LABELS[shape], **style)
        axis.plot(1, facts[DENSE]["perplexity"], "k*", label=DENSE)
        axis.set(title=title, xlabel="speed of further tokens, dense = 1", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0, 0].set_ylabel("perplexity")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    return figure
