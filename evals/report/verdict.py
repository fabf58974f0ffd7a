"""What a manager asks of a pruned model: how much smaller and faster, how much worse, and where.

All of it is computed from what is in the report: sizes, times, and paired differences from the
dense model with their confidence intervals.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hipp_ext.evals.report.captions import caption_changes
from hipp_ext.evals.report.changes import Change
from hipp_ext.evals.report.disagreements import Disagreement
from hipp_ext.evals.report.entries import Entry, Sources

_PHASES = {"prefill_speedup": "first token", "decode_speedup": "further tokens"}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How many times as fast as the dense model.

    Attributes:
        what: what was timed.
        where: the runtime and its weights; "" is transformers, in the process of `hipp latency`.
        times: median of the paired ratios.
        low, high: its 95% interval; with fewer than six pairs, their range; None: unknown.
        is_range: whether they are the range.
        n: number of pairs; None: unknown.
    """

    what: str
    where: str = ""
    times: float
    low: float | None = None
    high: float | None = None
    is_range: bool = False
    n: int | None = None

    @property
    def told_apart(self) -> bool:
        """Whether the interval, or every pair, says the same: faster, or slower."""
        return self.low is not None and self.high is not None and (self.low > 1 or self.high < 1)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The three answers about one pruned model.

    Attributes:
        name: name of the model.
        parameters: numbers of parameters (dense, pruned); None: unknown.
        speeds: measured speeds; those of `hipp latency` come first.
        changes: one change per data set and per score of captions.
        not_compared: names of data sets that both answered and that could not be compared.
        parts: changes of the parts of data sets.
    """

    name: str
    parameters: tuple[int, int] | None = None
    speeds: tuple[Speed, ...] = ()
    changes: tuple[Change, ...] = ()
    not_compared: tuple[str, ...] = ()
    parts: tuple[Change, ...] = ()

    @property
    def fewer(self) -> float | None:
        """Fraction of all parameters that is gone; None: unknown."""
        return 1 - self.parameters[1] / self.parameters[0] if self.parameters else None

    @property
    def hurt(self) -> list[Change]:
        """Parts on which the model is worse, those that lost most first."""
        return sorted((c for c in self.parts if c.worse), key=lambda c: -c.loss)


def verdicts(
    sources: Sources, differing: Mapping[str, Sequence[Disagreement]]
) -> tuple[Verdict, ...]:
    """The verdict on each model but the first, which they are compared with.

    Args:
        sources: contents of the report.
        differing: comparisons of answers with the first model, by model.
    """
    dense, *others = sources.entries
    return tuple(_verdict(sources, dense, e, differing.get(e.name, ())) for e in others)


def _verdict(
    sources: Sources, dense: Entry, entry: Entry, found: Sequence[Disagreement]
) -> Verdict:
    compared = {own.data for own in found}
    return Verdict(
        name=entry.name,
        parameters=(dense.parameters, entry.parameters)
        if dense.parameters and entry.parameters
        else None,
        speeds=tuple(_speeds(sources, dense.name, entry.name)),
        changes=(*(own.whole for own in found), *caption_changes(dense, entry)),
        not_compared=tuple(
            data for data in entry.records if data in dense.records and data not in compared
        ),
        parts=tuple(change for own in found for change in own.parts),
    )


def _speeds(sources: Sources, dense: str, name: str) -> Iterator[Speed]:
    """The speeds in results whose first model, which others are compared with, is the dense one."""
    for one in (*sources.latency, *sources.served):
        models, serving = one["models"], one.get("serving")
        if next(iter(models)) != dense or name not in models:
            continue
        where = f"{serving['runtime']} {serving['weights']}" if serving else ""
        for key, what in _PHASES.items():
            ratio = models[name].get(key)
            if ratio:
                is_range = "low" not in ratio
                yield Speed(
                    what=what,
                    where=where,
                    times=ratio["median"],
                    low=ratio.get("least" if is_range else "low"),
                    high=ratio.get("most" if is_range else "high"),
                    is_range=is_range,
                    n=ratio.get("n"),
                )
