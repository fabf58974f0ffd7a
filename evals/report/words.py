"""The verdict in words: numbers with their intervals, and what the questions do not tell apart."""

from collections.abc import Iterator

from hipp_ext.evals.report.captions import FOUND, WRONG
from hipp_ext.evals.report.changes import Change, interval_known
from hipp_ext.evals.report.verdict import Speed, Verdict

_MINUS, _SPACE = "\u2212", "\u00a0"  # a space where no line breaks
_MOST_DIGITS = 4
_POPE = {
    "answer is yes": "misses objects that are there",
    "answer is no": "sees objects that are not there",
}


def points(value: float, digits: int = 1) -> str:
    """A difference in percentage points, with its sign."""
    text = f"{value:+.{digits}f}"
    return text[1:] if not float(text) else text.replace("-", _MINUS)


def interval(change: Change) -> str:
    """The interval of a difference, with as many digits as tell it from 0 where it excludes 0;
    empty where there are too few pictures for an interval.
    """
    if not interval_known(change):
        return ""
    ends = change.difference.low, change.difference.high
    digits = _digits(ends, 0, 1) if change.told_apart else 1
    return " to ".join(points(end, digits) for end in ends).replace(" ", _SPACE)


def _digits(ends: tuple[float, float], bound: float, fewest: int) -> int:
    """The fewest digits after the point with which neither end looks like the bound."""
    wanted = range(fewest, _MOST_DIGITS)
    return next((d for d in wanted if all(round(e, d) != bound for e in ends)), _MOST_DIGITS)


def difference(change: Change) -> str:
    """A difference with its interval, as in "-4.6 points (-6.1 to -3.1)"."""
    known = interval(change)
    return f"{points(change.difference.value)}{_SPACE}points" + (f" ({known})" if known else "")


def outcome(change: Change) -> str:
    """The difference, or that there is none to tell."""
    return difference(change) if change.told_apart else "not told apart"


def subject(change: Change) -> str:
    """What a change is about."""
    data = change.data.removesuffix("_TEST")
    if change.part in (WRONG, FOUND):
        return f"{data}: {change.part}"
    return f"{data} “{change.part}”" if change.part else data


def meaning(change: Change) -> str:
    """What a loss on this part means, where it is known."""
    return _POPE.get(change.part, "") if "POPE" in change.data and change.worse else ""


def size(verdict: Verdict) -> str:
    """How many parameters are gone."""
    if verdict.fewer is None:
        return "size not known"
    percent = round(100 * abs(verdict.fewer), 1 if abs(verdict.fewer) < 0.1 else None)
    if not percent:
        return "as many parameters"
    return f"{percent:g}% {'fewer' if verdict.fewer > 0 else 'more'} parameters"


def times(speed: Speed) -> str:
    """How many times as fast."""
    return f"{speed.times:.2f} times as fast"


def spread(speed: Speed) -> str:
    """The interval of a speed, or the range of its pairs; empty where it is unknown."""
    if speed.low is None or speed.high is None:
        return ""
    digits = _digits((speed.low, speed.high), 1, 2) if speed.told_apart else 2
    return f"{speed.low:.{digits}f} to {speed.high:.{digits}f}"


def _speed(verdict: Verdict) -> str:
    first = next((s for s in verdict.speeds if s.what == "first token"), None)
    if first is None:
        return "speed not measured"
    where = f" in {first.where}" if first.where else ""
    how = times(first) if first.told_apart else "speed not told apart"
    return f"first token{where} {how}"


def _changes(verdict: Verdict) -> Iterator[str]:
    """Of the captions only what is not there: it is what pruning is feared for."""
    for change in verdict.changes:
        if not change.part or change.part == WRONG:
            yield f"{subject(change)} {outcome(change)}"
    if verdict.not_compared:
        yield f"{', '.join(verdict.not_compared)} not compared"
    if not verdict.changes and not verdict.not_compared:
        yield "no answers compared"


def verdict_line(verdict: Verdict) -> str:
    """The verdict in one line, without the name of the model."""
    parts = [f"{size(verdict)}, {_speed(verdict)}", *_changes(verdict)]
    if hurt := verdict.hurt:
        parts.append(f"most lost: {subject(hurt[0])} {difference(hurt[0])}")
    elif verdict.parts:
        parts.append("no part stands out")
    return "; ".join(parts)
