"""`hipp report`: one self-contained HTML page about evaluated models, and PNG figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipp_ext.evals.disagreements import Disagreement, disagreements
from hipp_ext.evals.figures import cost_figure, front_figure, keeps_figure, png, pope_figure, svg
from hipp_ext.evals.report_page import Picture, page
from hipp_ext.evals.report_sources import Fit, Sources, main_yes_no, read_sources
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
    for plan in _pictures(sources):
        figure = plan.draw()
        write_atomic(place / f"{plan.name}.png", png(figure))
        pictures.append(
            Picture(name=plan.name, section=plan.section, caption=plan.caption, svg=svg(figure))
        )
    write_atomic(place / PAGE, page(sources, pictures, _differing(sources, given)))
    return place / PAGE


@dataclass(frozen=True, kw_only=True)
class _Drawing:
    name: str
    section: str
    caption: str
    draw: Callable[[], "Figure"]


def _pictures(sources: Sources) -> list[_Drawing]:
    found: list[_Drawing] = []
    fits = [fit for fit in sources.fits if len(fit.archive)]
    for number, fit in enumerate(fits):
        chosen = {e.name: e.reward for e in sources.entries if e.reward} if len(fits) == 1 else {}
        found.append(
            _front(
                fit,
                chosen,
                "front" if number == 0 else f"front-{number + 1}",
                several=len(fits) > 1,
            )
        )
    plans = {e.name: e.plan for e in sources.entries if e.plan}
    same = len({tuple((g.name, g.width) for g in plan.groups) for plan in plans.values()}) == 1
    groups = next(iter(plans.values())).groups if plans else ()
    if same and len(groups) <= MAX_GROUPS and any(g.tower == "language" for g in groups):
        found.append(_keeps(plans, next((f.visual for f in sources.fits if f.visual), None)))
    main = main_yes_no(sources.entries)
    scores = {
        e.name: e.records[main]["metrics"]["vlmeval"] for e in sources.entries if main in e.records
    }
    if scores:
        caption = (
            "Accuracy by VLMEvalKit's rule; error bars show one standard error over images. A "
            "model that uses the image answers yes to half of the questions."
        )
        found.append(
            _Drawing(
                name="pope", section="pope", caption=caption, draw=partial(pope_figure, scores)
            )
        )
    for number, result in enumerate(sources.latency):
        name = "cost" if number == 0 else f"cost-{number + 1}"
        caption = (
            "Cost of each model in percent of the first one; times are medians with quartiles. "
            "Memory is the peak during a generation, with the weights."
        )
        draw = partial(cost_figure, _shares(result["models"]))
        found.append(_Drawing(name=name, section="cost", caption=caption, draw=draw))
    return found


def _front(fit: Fit, chosen: Mapping[str, Any], name: str, *, several: bool) -> _Drawing:
    evaluated, front = (
        [r.reward for r in fit.archive.measured],
        [r.reward for r in fit.archive.front()],
    )
    caption = (
        f"{fit.name + ': ' if several else ''}{len(evaluated)} plans evaluated while searching; "
        f"{len(front)} are non-dominated (ringed, with standard errors). Upper right is better. "
        f"Hypervolume {fit.archive.hypervolume():.4f}, reference point 0, 0, 0."
    )
    return _Drawing(
        name=name,
        section="front",
        caption=caption,
        draw=partial(front_figure, evaluated, front, chosen),
    )


def _keeps(plans: Mapping[str, Any], visual: dict[str, list[float]] | None) -> _Drawing:
    caption = "Units kept in every layer."
    if visual:
        caption += (
            " Below: how much of the layer's result comes from the image (attention: flow from "
            "image to text tokens; FFN: drift of image tokens), measured before pruning."
        )
    return _Drawing(
        name="keep_counts",
        section="kept",
        caption=caption,
        draw=partial(keeps_figure, plans, visual),
    )


def _shares(
    models: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """(value, lower quartile, upper quartile) in percent of the first model's value, by quantity
    and model.
    """
    first = next(iter(models.values()))
    shares: dict[str, dict[str, tuple[float, float, float]]] = {}
    for label, key in (
        ("parameters", "parameters"),
        ("FLOPs of the prompt", "prefill_gflops"),
        ("peak memory", "peak_mib"),
    ):
        shares[label] = {name: (100 * row[key] / first[key],) * 3 for name, row in models.items()}
    for label, key in (("first token", "prefill_ms"), ("further token", "decode_ms")):
        base = first[key]["median"]
        shares[label] = {
            name: (
                100 * row[key]["median"] / base,
                100 * row[key]["low"] / base,
                100 * row[key]["high"] / base,
            )
            for name, row in models.items()
        }
    return shares


def _differing(sources: Sources, near: Sequence[Path]) -> dict[str, list[Disagreement]]:
    """The disagreements of each model with the first one, by name."""
    dense, *others = sources.entries
    found = {e.name: disagreements(dense.records, e.records, near) for e in others}
    return {name: own for name, own in found.items() if own}
