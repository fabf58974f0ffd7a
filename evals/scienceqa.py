"""ScienceQA: multiple choice about a picture. Answers in, accuracy with an error bar out.

The rule is VLMEvalKit's exact matching, the one that needs no judge model and draws nothing at random. An answer
that it cannot read is "Z", which is no option, so it is wrong; the share of such answers is reported, because a model
that lost the format and a model that lost the knowledge need different repairs.

Source: arXiv 2209.09513 (the benchmark); VLMEvalKit's utils/matching_util.py (the rule).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hipp_ext.evals.metrics import binomial_se

UNREADABLE = "Z"
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_TAIL = 4  # a letter counts when its first place is among the last 4 words: "A." does, "A red square on top of" not
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def option_letter(answer: str, options: Mapping[str, object]) -> str:
    """The option that an answer means, or "Z" when it cannot be read: VLMEvalKit's exact matching.

    The only option letter that occurs as a word, if it stands near the end; else the only option whose text occurs in
    the answer, whatever the case, unless the answer is more than twice as long as all options together.

    Args:
        answer: what the model said.
        options: letter ("A" to "Z") to the option's text (numbers are read as their text).
    """
    return _by_letter(answer, options) or _by_text(answer, options) or UNREADABLE


def _by_letter(answer: str, options: Mapping[str, object]) -> str | None:
    if "Failed to obtain answer via API" in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return UNREADABLE
    words = answer.translate(_SEPARATORS).split()
    named = [letter for letter in options if letter in words]
    if not named and UNREADABLE in words:
        return UNREADABLE
    if len(named) == 1 and words.index(named[0]) >= len(words) - _TAIL:
        return named[0]
    return None


def _by_text(answer: str, options: Mapping[str, object]) -> str | None:
    answer = answer.lower()
    if len(answer) > 2 * sum(len(str(text)) for text in options.values()):
        return None
    found = [letter for letter, text in options.items() if str(text).lower() in answer]
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True, kw_only=True)
class ChoiceScores:
    """Scores of one group of questions. Rates and their standard errors (`_se`, binomial) are percentages, [0, 100].

    Attributes:
        n: questions.
        accuracy: right answers; one that cannot be read is wrong. Higher is better.
        unknown_rate: answers that cannot be read as an option.
    """

    n: int
    accuracy: float
    accuracy_se: float
    unknown_rate: float
    unknown_rate_se: float


def scienceqa_scores(
    answers: Sequence[str],
    labels: Sequence[str],
    options: Sequence[Mapping[str, object]],
    groups: Mapping[str, Sequence[object]] | None = None,
) -> dict[str, ChoiceScores]:
    """Scores in percent: "overall", then "<column>=<value>" for each value of each grouping column.

    Args:
        answers: what the model said, one per question.
        labels: the letter of the right option, one per question.
        options: letter to text, one mapping per question.
        groups: column name (such as "category") to the value of each question.

    Raises:
        ValueError: the sequences differ in length or are empty, or a label is not one of its question's options.
    """
    groups = groups or {}
    lengths = [len(answers), len(labels), len(options), *map(len, groups.values())]
    if len(set(lengths)) != 1 or not lengths[0]:
        raise ValueError(
            f"ScienceQA needs answers, labels, options and groups of one length, above 0; got {lengths}"
        )
    for row, (label, choice) in enumerate(zip(labels, options, strict=True)):
        if label not in choice:
            raise ValueError(
                f"question {row}: the answer {label!r} is not one of the options {sorted(choice)}"
            )
    letters = [
        option_letter(answer, choice) for answer, choice in zip(answers, options, strict=True)
    ]
    rows = {"overall": list(range(len(letters)))}
    for column, values in groups.items():
        for value in sorted(set(values), key=str):
            rows[f"{column}={value}"] = [row for row, own in enumerate(values) if own == value]
    return {
        name: _scores([letters[row] for row in own], [labels[row] for row in own])
        for name, own in rows.items()
    }


def _scores(letters: Sequence[str], labels: Sequence[str]) -> ChoiceScores:
    n = len(letters)
    accuracy = 100 * sum(said == label for said, label in zip(letters, labels, strict=True)) / n
    unknown = (
        100
        * sum(said == UNREADABLE != label for said, label in zip(letters, labels, strict=True))
        / n
    )
    return ChoiceScores(
        n=n,
        accuracy=accuracy,
        accuracy_se=binomial_se(accuracy, n),
        unknown_rate=unknown,
        unknown_rate_se=binomial_se(unknown, n),
    )
