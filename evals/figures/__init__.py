"""Figures for reports. matplotlib, no global state.

A figure is drawn once, as wide as a phone can show it, with its panels below each other. As an SVG
element it takes the colours of the page that holds it, so it fits light and dark pages.
"""

from hipp_ext.evals.figures.changes import changes_figure
from hipp_ext.evals.figures.cost import cost_figure
from hipp_ext.evals.figures.front import front_figure
from hipp_ext.evals.figures.keeps import keeps_figure
from hipp_ext.evals.figures.output import png, svg
from hipp_ext.evals.figures.splits import splits_figure
from hipp_ext.evals.figures.style import Mark, label, marks

__all__ = [
    "Mark",
    "changes_figure",
    "cost_figure",
    "front_figure",
    "keeps_figure",
    "label",
    "marks",
    "png",
    "splits_figure",
    "svg",
]
