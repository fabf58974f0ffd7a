"""`hipp report`: one self-contained HTML page about evaluated models, and PNG figures."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipp_ext.evals.disagreements import Disagreement, disagreements
from hipp_ext.evals.figures import cost_figure, front_figure, keeps_figure, png, pope_figure, svg
from hipp_ext.evals.report_page import Picture, page
from hipp_ext.evals.report_sources import Sources, main_yes_no, read_sources
from hipp_ext.evals.report_table import table_rows
from hipp_ext.files import write_atomic

__all__ = ["table_rows", "write_report"]

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "report.html"
MAX_GROUPS = 4000  # groups of a plan that is drawn, because each gets its own cell


def write_report(folders: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write report.html and its figures (PNG) about the contents of some folders; returns the
    page's path.

    The page needs no other file and no network. Its figures are SVG elements, which take the
    colours of the page, light or dark, and scale to the width of the screen.

    Args:
        folders: folders or files as in `report_sources`; the report shows the models of all of
            them.
        out: folder of the page. Default: the first of `folders`.

    Raises:
        DataError: a folder holds nothing to report, or a file is damaged.
    """
    given = [
        Path(f).expanduser() for f in ([folders] if isinstance(folders, str | Path) else folders)
    ]
    sources = read_sources(given)
    place = Path(out) if out is not None else given[0] if given[0].is_dir() else given[0].parent
    pictures = []
    for name, section, caption, figure in _pictures(sources):
        write_atomic(place / f"{name}.png", png(figure))
        pictures.append(Picture(name=name, section=section, caption=caption, svg=svg(figure)))
    write_atomic(place / PAGE, page(sources, pictures, _differing(sources, given)))
    return place / PAGE


def _pictures(sources: Sources) -> "Iterator[tuple[str, str, str, Figure]]":
    """(name, section, caption, figure) of every figure."""
    fits = [fit for fit in sources.fits if len(fit.archive)]
    for number, fit in enumerate(fits, start=1):
        evaluated = [r.reward for r in fit.archive.measured]
        front = [r.reward for r in fit.archive.front()]
        chosen = {e.name: e.reward for e in sources.entries if e.reward} if len(fits) == 1 else {}
        caption = (
            f"{fit.name + ': ' if len(fits) > 1 else ''}{len(evaluated)} plans evaluated while "
            f"searching; {len(front)} are non-dominated (ringed, with standard errors). Upper "
            f"right is better. Hypervolume {fit.archive.hypervolume():.4f}, reference point 0, 0, "
            "0."
        )
        yield _numbered("front", number), "front", caption, front_figure(evaluated, front, chosen)
    plans = {e.name: e.plan for e in sources.entries if e.plan}
    same = len({tuple((g.name, g.width) for g in plan.groups) for plan in plans.values()}) == 1
    groups = next(iter(plans.values())).groups if plans else ()
    if same and len(groups) <= MAX_GROUPS and any(g.tower == "language" for g in groups):
        visual = next((f.visual for f in sources.fits if f.visual), None)
        caption = "Units kept in every layer."
        if visual:
            caption += (
                " Below: how much of the layer's result comes from the image (attention: flow from "
                "image to text tokens; FFN: drift of image tokens), measured before pruning."
            )
        yield "keep_counts", "kept", caption, keeps_figure(plans, visual)
    main = main_yes_no(sources.entries)
    scores = {
        e.name: e.records[main]["metrics"]["vlmeval"] for e in sources.entries if main in e.records
    }
    if scores:
        caption = (
            "Accuracy by VLMEvalKit's rule; error bars show one standard error over images. A "
            "model that uses the image answers yes to half of the questions."
        )
        yield "pope", "pope", caption, pope_figure(scores)
    for number, result in enumerate(sources.latency, start=1):
        caption = (
            "Cost of each model in percent of the first one; times are medians with quartiles. "
            "Memory is the peak during a generation, with the weights."
        )
        figure = cost_figure(_shares(result["models"]))
        yield _numbered("cost", number), "cost", caption, figure


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def _shares(
    models: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """(value, lower quartile, upper quartile) in percent of the first model's value, by quantity
    and model.
    """
    first = next(iter(models.values()))
    shares: dict[str, dict[str, tuple[float, float, float]]] = {}
    for label, key, parts in (
        ("parameters", "parameters", ()),
        ("FLOPs of the prompt", "prefill_gflops", ()),
        ("peak memory", "peak_mib", ()),
        ("first token", "prefill_ms", ("median", "low", "high")),
        ("further token", "decode_ms", ("median", "low", "high")),
    ):
        base = first[key]["median"] if parts else first[key]
        for name, row in models.items():
            values = [row[key][part] for part in parts] or [row[key]] * 3
            shares.setdefault(label, {})[name] = tuple(100 * value / base for value in values)
    return shares


def _differing(sources: Sources, near: Sequence[Path]) -> dict[str, list[Disagreement]]:
    """The disagreements of each model with the first one, by name."""
    dense, *others = sources.entries
    found = {e.name: disagreements(dense.records, e.records, near) for e in others}
    return {name: own for name, own in found.items() if own}
