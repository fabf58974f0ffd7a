"""Writes the page of `hipp report`, and its figures as PNG files beside it."""

from collections.abc import Sequence
from pathlib import Path

from hipp_ext.evals.figures import png, svg
from hipp_ext.evals.report.disagreements import Disagreement, disagreements
from hipp_ext.evals.report.entries import Sources
from hipp_ext.evals.report.page import Picture, page
from hipp_ext.evals.report.pictures import pictures
from hipp_ext.evals.report.sources import read_sources
from hipp_ext.evals.report.verdict import verdicts
from hipp_ext.files import write_atomic

PAGE = "report.html"


def write_report(folders: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write report.html and its figures (PNG, for slides) about the contents of some folders;
    returns the page's path.

    The page needs no other file and no network. Its figures are SVG elements, which take the
    colours of the page, light or dark, and scale to the width of the screen.

    Args:
        folders: folders or files as in `sources`; the report shows the models of all of them.
        out: folder of the page. Default: the first of `folders`.

    Raises:
        DataError: a folder holds nothing to report, or a file is damaged.
    """
    given = [
        Path(f).expanduser() for f in ([folders] if isinstance(folders, str | Path) else folders)
    ]
    sources = read_sources(given)
    place = Path(out) if out is not None else given[0] if given[0].is_dir() else given[0].parent
    differing = compared(sources, given)
    drawn = []
    for name, section, caption, figure in pictures(
        sources, verdicts(sources, differing), differing
    ):
        write_atomic(place / f"{name}.png", png(figure))
        drawn.append(Picture(name=name, section=section, caption=caption, svg=svg(figure, name)))
    write_atomic(place / PAGE, page(sources, drawn, differing))
    return place / PAGE


def compared(sources: Sources, near: Sequence[Path]) -> dict[str, list[Disagreement]]:
    """The comparisons of each model with the first one, by name."""
    dense, *others = sources.entries
    found = {e.name: disagreements(dense.records, e.records, near) for e in others}
    return {name: own for name, own in found.items() if own}
