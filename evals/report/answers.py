"""The three questions of a manager and their answers, as lines for the top of the page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hipp_ext.evals.report import words
from hipp_ext.evals.report.changes import Change, interval_known
from hipp_ext.evals.report.verdict import Speed, Verdict
from hipp_ext.evals.text_table import parameters_text

_MOST_HURT = 3  # parts of one model


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One line of an answer.

    Attributes:
        what: what it is about.
        value: the number in words, with its interval.
        note: what stands behind it, in small letters.
        tone: "better", "worse", "same" or "unknown".
    """

    what: str
    value: str
    note: str = ""
    tone: str = "same"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A question, and the facts about each pruned model."""

    question: str
    facts: dict[str, list[Fact]]


def answers(verdicts: Sequence[Verdict]) -> list[Answer]:
    """The three answers, in the order of the questions."""
    return [
        Answer(question=question, facts={v.name: list(own(v)) for v in verdicts})
        for question, own in (
            ("How much smaller and faster?", _smaller),
            ("How much worse?", _worse),
            ("Where does it hurt?", _where),
        )
    ]


def _smaller(verdict: Verdict) -> Iterator[Fact]:
    if verdict.parameters is None:
        yield Fact(what="parameters", value="not known", tone="unknown")
    else:
        dense, left = verdict.parameters
        yield Fact(
            what="parameters",
            value=words.size(verdict).removesuffix(" parameters"),
            note=f"from {parameters_text(dense)} to {parameters_text(left)}",
            tone="better" if left < dense else "same",
        )
    for speed in verdict.speeds:
        yield _speed(speed)
    if not verdict.speeds:
        yield Fact(what="speed", value="not measured", tone="unknown")


def _speed(speed: Speed) -> Fact:
    spread = words.spread(speed)
    if speed.n and spread:
        spread += f", {'range of ' if speed.is_range else ''}{speed.n} runs"
    faster = speed.told_apart and speed.times > 1
    return Fact(
        what=f"{speed.what}, {speed.where}" if speed.where else speed.what,
        value=words.times(speed) if speed.told_apart else "not told apart",
        note=spread or f"median {speed.times:.2f}, range not known",
        tone="better" if faster else "worse" if speed.told_apart else "same",
    )


def _worse(verdict: Verdict) -> Iterator[Fact]:
    for change in verdict.changes:
        yield _change(change)
    for data in verdict.not_compared:
        yield Fact(what=data, value="not compared", tone="unknown")
    if not verdict.changes and not verdict.not_compared:
        yield Fact(what="answers", value="not compared", tone="unknown")


def _change(change: Change) -> Fact:
    scores = f"from {change.a:.1f}% to {change.b:.1f}%"
    if not change.told_apart and interval_known(change):
        scores += f"; {words.difference(change)}"
    elif not interval_known(change):
        scores += "; too few pictures for an interval"
    meaning = words.meaning(change)
    return Fact(
        what=words.subject(change),
        value=words.outcome(change),
        note=f"{meaning}; {scores}" if meaning else scores,
        tone="worse" if change.worse else "better" if change.told_apart else "same",
    )


def _where(verdict: Verdict) -> Iterator[Fact]:
    hurt = verdict.hurt
    for change in hurt[:_MOST_HURT]:
        yield _change(change)
    if more := len(hurt) - _MOST_HURT if len(hurt) > _MOST_HURT else 0:
        note = "below, under “Every score”"
        yield Fact(what="and", value=f"{more} more part{'s' * (more > 1)}", note=note)
    if verdict.parts and not hurt:
        yield Fact(
            what=f"{len(verdict.parts)} parts",
            value="none stands out",
            note="none is told apart from the dense model as worse",
        )
    if not verdict.parts:
        yield Fact(what="parts", value="not compared", tone="unknown")
