"""Questions with candidate answers, scored by the probability of a candidate's first token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.answers import AnswerLogits
from hipp_ext.calibration import batches_digest, encode, join_answer
from hipp_ext.errors import CalibrationError
from hipp_ext.evals.references import answered
from hipp_ext.evals.statistics import binomial_se, clustered_mean_se


@runtime_checkable
class Question(Protocol):
    """The fields of a question that the evaluator reads; the testbed's questions have them."""

    @property
    def prompt(self) -> str:
        """Text of the user's turn."""
        ...

    @property
    def image(self) -> Any:
        """A PIL image."""
        ...

    @property
    def labels(self) -> Sequence[str]:
        """Candidate answers: Yes and No, or option letters."""
        ...

    @property
    def answer(self) -> str:
        """The correct candidate."""
        ...


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """How a model answers the questions of one task.

    Attributes:
        n: number of questions.
        accuracy: share of correct answers [%].
        accuracy_se: its standard error [percentage points], with questions taken as independent.
        margin: mean of (probability of the correct candidate - 1/candidates) / (1 - 1/candidates),
            with probabilities among the candidates. 1 is certain and correct, 0 is guessing. It is
            continuous, so it shows small differences.
        margin_se: standard error of the margin. Questions with the same `picture`, if they have
            one, form a cluster. NaN for a single cluster.
        yes_rate: share of "Yes" among the answers [%]; None if the candidates are not Yes and No.
        answers: candidate chosen for each question.
    """

    n: int
    accuracy: float
    accuracy_se: float
    margin: float
    margin_se: float
    yes_rate: float | None
    answers: tuple[str, ...]


class CandidateTask:
    """One task: questions whose answers are among candidates.

    Args:
        model: the dense model.
        processor: its processor.
        questions: the questions.
        batch_size: number of rows per forward pass.
        attack: see `Evaluator`; None: the images are not changed.
        adaptive: attack every model anew, not the dense one once.
        whole: plans may change what comes before the language tower, see `AnswerLogits`.

    Attributes:
        clusters: the picture of each question, in the order of the margins; a question without
            one is a cluster of its own.
        yes_no: whether all questions are to be answered with Yes or No.
        weights: of the questions, in the order of the margins, 1 on average: both answers of yes/no
            questions weigh the same in total.
        digest: hash of the questions, their images and answers.

    Raises:
        CalibrationError: two candidates begin with the same token.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        questions: tuple[Question, ...],
        batch_size: int,
        attack: Callable | None = None,
        adaptive: bool = False,
        whole: bool = False,
    ):
        self.questions = questions
        # Rows of similar length in one batch need less padding.
        self.order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))
        ordered = [questions[i] for i in self.order]
        chunks = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
        batches = [
            encode(processor, [q.prompt for q in rows], [q.image for q in rows]) for rows in chunks
        ]
        self.logits: Callable[[nn.Module], Tensor]
        if attack is None:
            self.logits = AnswerLogits(model, batches, whole=whole)
        else:
            labelled = [answered(processor, rows) for rows in chunks]

            def attacked(model: nn.Module) -> AnswerLogits:
                moved = [attack(model, batch)["pixel_values"].cpu() for batch in labelled]
                seen = [b | {"pixel_values": m} for b, m in zip(batches, moved, strict=True)]
                return AnswerLogits(model, seen, whole=whole)

            self.logits = (lambda model: attacked(model)(model)) if adaptive else attacked(model)
        tokens = _first_tokens(
            processor, questions[0], sorted({label for q in questions for label in q.labels})
        )
        width = max(len(q.labels) for q in ordered)
        self.candidates = torch.tensor(
            [[tokens[c] for c in q.labels] + [-1] * (width - len(q.labels)) for q in ordered]
        )
        self.clusters = [
            getattr(q, "picture", None) or f"question {i}"
            for i, q in zip(self.order, ordered, strict=True)
        ]
        self.correct = torch.tensor([list(q.labels).index(q.answer) for q in ordered])
        self.yes_no = all(tuple(q.labels) == ("Yes", "No") for q in questions)
        self.weights = np.ones(len(ordered))
        first = (self.correct == 0).numpy()
        if self.yes_no and 0 < (share := float(first.mean())) < 1:
            self.weights = np.where(first, 0.5 / share, 0.5 / (1 - share))
        self.digest = batches_digest(
            [*batches, {"candidates": self.candidates, "right": self.correct}]
        )

    def log_probabilities(self, model: nn.Module) -> Float[Tensor, "questions candidates"]:
        """Log probability of each candidate among the candidates; -inf beyond a question's last
        candidate.
        """
        picked = self.logits(model).gather(1, self.candidates.clamp_min(0))
        return picked.masked_fill(self.candidates < 0, -torch.inf).log_softmax(1)

    def margins(self, log_probabilities: Tensor) -> np.ndarray:
        """The margin of each question; see `TaskScores`."""
        guess = 1 / (self.candidates >= 0).sum(1)
        p_correct = log_probabilities.exp().gather(1, self.correct[:, None])[:, 0]
        return ((p_correct - guess) / (1 - guess)).numpy()

    def scores(self, log_probabilities: Tensor) -> TaskScores:
        """How a model with these log probabilities answers."""
        chosen = log_probabilities.argmax(1)
        accuracy = 100 * float((chosen == self.correct).float().mean())
        margins = self.margins(log_probabilities)
        by_question = dict(zip(self.order, chosen.tolist(), strict=True))
        answers = [q.labels[by_question[i]] for i, q in enumerate(self.questions)]
        return TaskScores(
            n=len(answers),
            accuracy=accuracy,
            accuracy_se=binomial_se(accuracy, len(answers)),
            margin=float(margins.mean()),
            margin_se=clustered_mean_se(margins, self.clusters),
            yes_rate=100 * answers.count("Yes") / len(answers) if self.yes_no else None,
            answers=tuple(map(str, answers)),
        )

    def balanced_margins(self, log_probabilities: Tensor) -> np.ndarray:
        """The margin of each question times its weight: a model that always gives the same answer
        to yes/no questions has a mean of 0."""
        return self.margins(log_probabilities) * self.weights

    def yes_bias(self, log_probabilities: Tensor) -> float:
        """Weighted mean of the probability of the first candidate, minus that of 1 where it is
        correct and 0 elsewhere."""
        said = log_probabilities[:, 0].exp().numpy() - (self.correct == 0).numpy()
        return float((said * self.weights).mean())


def _first_tokens(processor: Any, question: Question, candidates: Sequence[str]) -> dict[str, int]:
    """Id of the first token of each candidate, if the model answers with it."""
    message = {"role": "user", "content": [{"type": "text", "text": question.prompt}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    tokenizer = getattr(processor, "tokenizer", processor)

    def tokens_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt = tokens_of(text)
    tokens = {c: tokens_of(join_answer(text, c)) for c in candidates}
    # A tokenizer may merge the end of the prompt with the answer: the answer starts where the two
    # first differ.
    first = {
        c: next((b for a, b in zip(prompt + [-1], ids, strict=False) if a != b), -1)
        for c, ids in tokens.items()
    }
    if len(set(first.values())) < len(candidates):
        raise CalibrationError(
            f"The candidate answers {list(candidates)} do not differ in their first token: "
            f"{tokens}."
        )
    return first
