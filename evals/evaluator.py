"""A fast in-process evaluator for the planner: POPE and multiple choice, answers scored in one
forward pass.

It agrees with greedy generation if the model begins its answer with one of the candidates, as
models do that were trained or asked to. For numbers to publish, run `vlmeval` on the saved folder.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.answers import AnswerLogits
from hipp_ext.calibration import (
    Batch,
    batches_digest,
    check_processor,
    encode,
    image_token_id,
    join_answer,
)
from hipp_ext.errors import CalibrationError
from hipp_ext.evals.statistics import binomial_se, clustered_mean_se
from hipp_ext.image_attacks import ImageAttack

YES_BIAS_WEIGHT = 0.5
ROBUSTNESS = ("pope", "adversarial", "both")


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


class Evaluator:
    """`evaluator(model)` -> {"utility", "robustness", ...} for `HiPPPlanner.fit`; the same
    questions at every call.

    Utility is the margin on `choice`. Robustness is the margin on `pope` minus YES_BIAS_WEIGHT
    times the distance between the probability of "Yes" and the share of questions with that label,
    so that a model gains nothing by preferring one answer. Everything before the language tower is
    computed once, for `model`. Later calls take that model, masked or pruned in its language tower.

    Args:
        model: the dense model.
        processor: the processor of the model.
        pope: yes/no questions (`labels` Yes and No).
        choice: multiple-choice questions.
        batch_size: number of rows per forward pass.
        robustness: images that the objective is measured on: "pope" (unchanged images),
            "adversarial" (images that `attack` changed once, against the dense model; as fast per
            plan), or "both" (the mean of the two).
        adaptive: attack the model of every plan instead. It takes longer by the attack, and it is
            what a deployed model would face; attacks on the dense model are weaker against a pruned
            one.
        attack: maps (model, batch with labels) to a batch with other pixel_values. Default: PGD
            with ten steps and a maximum change of 4/255 per pixel.

    Attributes:
        digest: hash of the questions, their images and answers, `robustness` and `adaptive`. The
            attack's settings are not part of it.

    Raises:
        CalibrationError: the model takes no images, there are no questions, `robustness` is
            unknown, a POPE question is not yes/no, the processor is that of another model, or two
            candidates begin with the same token.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        pope: Iterable[Question],
        choice: Iterable[Question],
        *,
        batch_size: int = 64,
        robustness: str = "pope",
        attack: Callable[[nn.Module, Batch], Batch] | None = None,
        adaptive: bool = False,
    ):
        if robustness not in ROBUSTNESS:
            raise CalibrationError(
                f"robustness is one of {', '.join(ROBUSTNESS)}; got {robustness!r}."
            )
        if image_token_id(model) is None:
            raise CalibrationError(
                f"POPE and ScienceQA ask about pictures, and {type(model).__name__} takes none: "
                f"there is no fit on them. "
                "`hipp plan MODEL --pruning-ratio 0.3` plans for a language model without a fit."
            )
        check_processor(model, processor)
        pope, choice = tuple(pope), tuple(choice)
        if any(tuple(q.labels) != ("Yes", "No") for q in pope):
            raise CalibrationError(
                "The candidates of every POPE question must be Yes and No; were the two tasks "
                "swapped?"
            )
        self._tasks = {"choice": _Task(model, processor, choice, batch_size)}
        if robustness != "adversarial":
            self._tasks["pope"] = _Task(model, processor, pope, batch_size)
        if robustness != "pope":
            attack = attack or ImageAttack(processor, epsilon=4 / 255, steps=10)
            self._tasks["pope_attacked"] = _Task(
                model, processor, pope, batch_size, attack, adaptive
            )
        asked = [f"{name} {task.digest}" for name, task in self._tasks.items()]
        self.digest = hashlib.sha256(f"{asked} {adaptive}".encode()).hexdigest()

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Utility and robustness, their standard errors, and the accuracies [%].

        A standard error is left out if all questions of its task are about one image.
        """
        answers = {name: task.log_probabilities(model) for name, task in self._tasks.items()}
        scores = {name: self._tasks[name].scores(p) for name, p in answers.items()}
        asked = [name for name in self._tasks if name != "choice"]
        robust = [
            scores[n].margin - YES_BIAS_WEIGHT * abs(self._tasks[n].yes_bias(answers[n]))
            for n in asked
        ]
        errors = {
            "utility_se": scores["choice"].margin_se,
            # The same questions twice are not independent: the larger error, not one divided by the
            # root of two.
            "robustness_se": max(scores[n].margin_se for n in asked),
        }
        return {
            "utility": scores["choice"].margin,
            "robustness": sum(robust) / len(robust),
            **{name: error for name, error in errors.items() if math.isfinite(error)},
            "choice_accuracy": scores["choice"].accuracy,
            **{f"{n}_accuracy": scores[n].accuracy for n in asked},
        }

    def scores(self, model: nn.Module) -> dict[str, TaskScores]:
        """The scores of each task that is asked: "choice", "pope", "pope_attacked"."""
        return {
            name: task.scores(task.log_probabilities(model)) for name, task in self._tasks.items()
        }


def search_evaluator(
    model: nn.Module, processor: Any, n: int, split: str = "search", robustness: str = "pope"
) -> Evaluator:
    """The evaluator on the testbed: `n` POPE and `n` ScienceQA questions of a split.

    Args:
        model, processor: see `Evaluator`.
        n: number of questions per task.
        split: split of the testbed.
        robustness: see `Evaluator`.
    """
    from hipp_ext import testbed

    pope, choice = testbed.questions("POPE", split, n), testbed.questions("ScienceQA", split, n)
    return Evaluator(model, processor, pope, choice, robustness=robustness)


class _Task:
    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        questions: tuple[Question, ...],
        batch_size: int,
        attack: Callable | None = None,
        adaptive: bool = False,
    ):
        if not questions:
            raise CalibrationError("The evaluator needs at least one question of each task.")
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
            self.logits = AnswerLogits(model, batches)
        else:
            labelled = [answered(processor, rows) for rows in chunks]

            def attacked(model: nn.Module) -> AnswerLogits:
                moved = [attack(model, batch)["pixel_values"].cpu() for batch in labelled]
                return AnswerLogits(
                    model, [b | {"pixel_values": m} for b, m in zip(batches, moved, strict=True)]
                )

            self.logits = (lambda model: attacked(model)(model)) if adaptive else attacked(model)
        tokens = _first_tokens(
            processor, questions[0], sorted({label for q in questions for label in q.labels})
        )
        width = max(len(q.labels) for q in ordered)
        self.candidates = torch.tensor(
            [[tokens[c] for c in q.labels] + [-1] * (width - len(q.labels)) for q in ordered]
        )
        self.clusters = [
            getattr(q, "picture", None) or str(i) for i, q in zip(self.order, ordered, strict=True)
        ]
        self.correct = torch.tensor([list(q.labels).index(q.answer) for q in ordered])
        self.digest = batches_digest(
            [*batches, {"candidates": self.candidates, "right": self.correct}]
        )

    def log_probabilities(self, model: nn.Module) -> Float[Tensor, "questions candidates"]:
        """Log probability of each candidate among the candidates; -inf beyond a question's last
        candidate.
        """
        picked = self.logits(model).gather(1, self.candidates.clamp_min(0))
        return picked.masked_fill(self.candidates < 0, -torch.inf).log_softmax(1)

    def scores(self, log_probabilities: Tensor) -> TaskScores:
        chosen = log_probabilities.argmax(1)
        accuracy = 100 * float((chosen == self.correct).float().mean())
        guess = 1 / (self.candidates >= 0).sum(1)
        p_correct = log_probabilities.exp().gather(1, self.correct[:, None])[:, 0]
        margins = (p_correct - guess) / (1 - guess)
        by_question = dict(zip(self.order, chosen.tolist(), strict=True))
        answers = [q.labels[by_question[i]] for i, q in enumerate(self.questions)]
        yes_no = all(tuple(q.labels) == ("Yes", "No") for q in self.questions)
        return TaskScores(
            n=len(answers),
            accuracy=accuracy,
            accuracy_se=binomial_se(accuracy, len(answers)),
            margin=float(margins.mean()),
            margin_se=clustered_mean_se(margins.numpy(), self.clusters),
            yes_rate=100 * answers.count("Yes") / len(answers) if yes_no else None,
            answers=tuple(map(str, answers)),
        )

    def yes_bias(self, log_probabilities: Tensor) -> float:
        """Mean probability of the first candidate minus the share of questions for which it is
        correct.
        """
        return float(log_probabilities[:, 0].exp().mean() - (self.correct == 0).float().mean())


def answered(processor: Any, questions: Sequence[Question]) -> Batch:
    """The questions as one batch with labels, which are the correct answers."""
    prompts, images, answers = (
        [getattr(q, a) for q in questions] for a in ("prompt", "image", "answer")
    )
    return encode(processor, prompts, images, answers)


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
