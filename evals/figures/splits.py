"""Accuracy by split, and how often each model says yes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hipp_ext.evals.figures.style import INK, Mark, drawing, label, legend, marks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = {"accuracy": "accuracy [%]", "yes_rate": 'answers "yes" [%]'}
_ROW, _GAP = 0.17, 0.2  # height of a model, and between splits [inches]


def splits_figure(
    scores: Mapping[str, Mapping[str, Mapping[str, float]]],
    splits: Sequence[str],
    yes: Mapping[str, float] | None = None,
    *,
    models: Sequence[str] = (),
) -> "Figure":
    """Accuracy by split with standard errors, and the share of the answers yes.

    Args:
        scores: fields of `POPEScores` in percent, by model name and split.
        splits: names of the splits, in order; a model may lack some.
        yes: share of the questions of a split whose right answer is yes [%]; it gets a line.
        models: names of the models of all figures, the dense one first; they tell the colours.
    """
    looks = marks([*models, *scores])
    there = [split for split in splits if any(split in own for own in scores.values())]
    step = 1 / (len(scores) + _GAP / _ROW)  # of a split, which is 1 high
    height = len(_PANELS) * (0.6 + len(there) * (len(scores) * _ROW + _GAP)) + 0.4
    with drawing(height) as figure:
        for number, (metric, title) in enumerate(_PANELS.items()):
            axes = figure.add_subplot(len(_PANELS), 1, number + 1)
            for place, split in enumerate(there if metric == "yes_rate" and yes else ()):
                if split in (yes or {}):
                    x, y = (yes or {})[split], place + 0.5
                    axes.plot([x, x], [y - 0.42, y + 0.42], color=INK, lw=1, ls=":")
            for i, (name, own) in enumerate(scores.items()):
                _points(axes, there, own, metric, (i + 1) * step, label(name), looks[name])
            axes.set_yticks([place + 0.5 for place in range(len(there))], map(label, there))
            axes.set_ylim(len(there), 0)
            axes.set_xlabel(title)
            axes.grid(axis="y", visible=False)
            axes.margins(x=0.12)
        legend(figure, figure.axes[0])
    return figure


def _points(
    axes: Any,
    splits: Sequence[str],
    own: Mapping[str, Mapping[str, float]],
    metric: str,
    offset: float,
    name: str,
    mark: Mark,
) -> None:
    asked = [(place, own[split]) for place, split in enumerate(splits) if split in own]
    axes.errorbar(
        [row[metric] for _, row in asked],
        [place + offset for place, _ in asked],
        xerr=[row.get(f"{metric}_se") or 0 for _, row in asked],
        fmt=mark.shape,
        ms=5,
        color=mark.colour,
        elinewidth=1.2,
        label=name,
    )
