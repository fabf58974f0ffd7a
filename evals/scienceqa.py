"""ScienceQA: multiple choice about a picture. Answers in, accuracy with an error bar out.

The rule is VLMEvalKit's exact matching, which needs no judge model and is not random. An answer
that it cannot read becomes "Z", which is no option, so it is wrong. The share of such answers is
reported, because a model that no longer follows the format needs another repair than one that no
longer knows the answer.

Source: arXiv 2209.09513 (the benchmark); VLMEvalKit's utils/matching_util.py (the rule).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hipp_ext.evals.statistics import binomial_se

UNREADABLE = "Z"
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# A letter counts if it first occurs among the last 4 words: in "A.", not in "A red square on top".
_TAIL = 4
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def option_letter(answer: str, options: Mapping[str, object]) -> str:
    """The option that an answer means, or "Z" when it cannot be read: VLMEvalKit's exact matching.

    This is the only option letter that occurs as a word, if it is near the end. Otherwise it is the
    only option whose text occurs in the answer, in upper or lower case, unless the answer is more
    than twice as long as all options.

    Args:
        answer: answer of the model.
        options: text of each option by its letter ("A" to "Z"); numbers are read as text.
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
    """Scores of one group of questions. Rates and their standard errors (`_se`, binomial) are
    percentages, [0, 100].

    Attributes:
        n: number of questions.
        accuracy: share of correct answers; an answer that cannot be read is wrong. Higher is
            better.
        unknown_rate: share of answers that cannot be read as an option.
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
        answers: answer of the model to each question.
        labels: letter of the correct option of each question.
        options: text of each option by its letter, for each question.
        groups: value of each question by column name, such as "category".

    Raises:
        ValueError: the sequences differ in length or are empty, or a label is not one of its
            question's options.
    """
    groups = groups or {}
    lengths = [len(answers), len(labels), len(options), *map(len, groups.values())]
    if len(set(lengths)) != 1 or not lengths[0]:
        raise ValueError(
            "ScienceQA needs answers, labels, options and groups of one length, above 0; got "
            f"{lengths}"
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
    pairs = list(zip(letters, labels, strict=True))
    accuracy = 100 * sum(letter == label for letter, label in pairs) / n
    unknown = 100 * sum(letter == UNREADABLE != label for letter, label in pairs) / n
    return ChoiceScores(
        n=n,
        accuracy=accuracy,
        accuracy_se=binomial_se(accuracy, n),
        unknown_rate=unknown,
        unknown_rate_se=binomial_se(unknown, n),
    )
