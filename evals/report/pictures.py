"""The figures of a report, with their captions."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from hipp_ext.evals.figures import (
    changes_figure,
    cost_figure,
    front_figure,
    keeps_figure,
    splits_figure,
)
from hipp_ext.evals.pope import SPLITS
from hipp_ext.evals.report.changes import interval_known
from hipp_ext.evals.report.disagreements import Disagreement
from hipp_ext.evals.report.entries import Fit, Sources, main_yes_no
from hipp_ext.evals.report.shares import served_shares, shares
from hipp_ext.evals.report.verdict import Verdict
from hipp_ext.evals.report.words import subject
from hipp_ext.planner.reward import Reward

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Drawn = tuple[str, str, str, "Figure"]

MAX_GROUPS = 4000  # groups of a plan that is drawn, because each gets its own bar
MAX_ROWS = 14  # of the figure of changes: data sets, then the parts that changed most


def pictures(
    sources: Sources, verdicts: Sequence[Verdict], differing: Mapping[str, Sequence[Disagreement]]
) -> "Iterator[Drawn]":
    """(name, section, caption, figure) of every figure."""
    yield from _changes(sources, verdicts)
    yield from _splits(sources, differing)
    yield from _costs(sources)
    yield from _kept(sources)
    for number, fit in enumerate((f for f in sources.fits if f.history.archive.records), start=1):
        yield _front(sources, fit, _numbered("front", number))


def _changes(sources: Sources, verdicts: Sequence[Verdict]) -> "Iterator[Drawn]":
    own = [(v.name, c) for v in verdicts for c in (*v.changes, *v.parts) if interval_known(c)]
    rows: dict[str, dict[str, tuple[float, float, float]]] = {}
    most: dict[str, float] = {}
    wholes = {subject(c) for v in verdicts for c in v.changes}
    for name, change in own:
        d, row = change.difference, subject(change)
        rows.setdefault(row, {})[name] = (d.value, d.low, d.high)
        most[row] = max(most.get(row, 0), abs(d.value)) if row not in wholes else float("inf")
    shown = sorted(rows, key=lambda row: -most[row])[:MAX_ROWS]
    if shown:
        caption = (
            "Difference from the dense model with its confidence interval (95%; wider for parts, "
            "because there are many). Left of the dotted line is worse, except for objects that "
            "captions invent. An interval across the line tells no difference."
        )
        drawn = {row: rows[row] for row in rows if row in shown}
        figure = changes_figure(drawn, sources.names[0], models=sources.names)
        yield "changes", "results", caption, figure


def _splits(sources: Sources, differing: Mapping[str, Sequence[Disagreement]]) -> "Iterator[Drawn]":
    main = main_yes_no(sources.entries)
    scores = {
        e.name: e.records[main]["metrics"]["vlmeval"] for e in sources.entries if main in e.records
    }
    if not scores:
        return
    yes = next((own.yes for found in differing.values() for own in found if own.data == main), {})
    caption = f"{main} by VLMEvalKit's rule; error bars show one standard error over images."
    if yes:
        caption += " Dotted: how many questions have the right answer yes."
    splits = list(SPLITS) if any(set(own) & set(SPLITS) for own in scores.values()) else ["overall"]
    yield ("pope", "results", caption, splits_figure(scores, splits, yes, models=sources.names))


def _costs(sources: Sources) -> "Iterator[Drawn]":
    both = [(shares(one["models"]), "quartiles") for one in sources.latency]
    both += [(served_shares(one["models"]), "the range") for one in sources.served]
    for number, (own, spread) in enumerate(both, start=1):
        caption = f"In percent of the first model, shorter is better; error bars show {spread}."
        if number > len(sources.latency):
            serving = sources.served[number - len(sources.latency) - 1]["serving"]
            caption = f"{serving['runtime']}, weights {serving['weights']}. {caption}"
        figure = cost_figure(own, models=sources.names)
        yield _numbered("cost", number), "cost", caption, figure


def _kept(sources: Sources) -> "Iterator[Drawn]":
    plans = {e.name: e.plan for e in sources.entries if e.plan}
    same = len({tuple((g.name, g.width) for g in plan.groups) for plan in plans.values()}) == 1
    groups = next(iter(plans.values())).groups if plans else ()
    if not same or len(groups) > MAX_GROUPS or all(g.tower != "language" for g in groups):
        return
    visual = next((f.visual for f in sources.fits if f.visual), None)
    caption = "What each layer of the language model keeps. A frame is all of its units."
    if visual:
        caption += (
            " Below, in grey: how much of the layer's result comes from the picture, measured "
            "before pruning (flow from picture to text tokens in attention; drift of picture "
            "tokens in the FFN)."
        )
    yield "keep_counts", "kept", caption, keeps_figure(plans, visual, models=sources.names)


def _front(sources: Sources, fit: Fit, name: str) -> "Drawn":
    archive, dense = fit.history.archive, fit.history.dense
    evaluated = [r.reward for r in archive.measured]
    front = [r.reward for r in archive.front()]
    chosen: dict[str, Reward] = {}
    if dense and {"utility", "robustness"} <= dense.keys():
        both = {key: dense[key] for key in ("utility", "robustness")}
        chosen[sources.names[0]] = Reward(**both, compression=0.0)
    sizes = {}
    for e in sources.entries:
        if e.plan and (reward := e.reward or fit.reward(e.plan)):
            chosen[e.name] = reward
        elif e.plan:
            sizes[e.name] = e.plan.pruning_ratio
    caption = (
        f"{fit.name}: the search tried {len(evaluated)} plans. Each dot tells what a plan removes "
        "and what is left of the model's skill on the questions of the search (1: no error, 0: "
        f"guessing). No plan beats one of the {len(front)} ringed ones in size, utility and "
        "robustness at once; bars show their standard errors. Stars are the models of this report."
    )
    if sizes:
        caption += (
            " Dotted lines: models whose plan the search did not try; only the size is known."
        )
    caption += f" Hypervolume {archive.hypervolume():.4f}, reference point 0, 0, 0."
    figure = front_figure(evaluated, front, chosen, sizes=sizes, models=sources.names)
    return name, "front", caption, figure


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"
