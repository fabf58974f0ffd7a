"""A fast in-process evaluator for the planner: POPE, multiple choice and reference answers, each
scored in one forward pass.

For POPE and multiple choice it agrees with greedy generation if the model begins its answer with
one of the candidates, as models do that were trained or asked to. A reference answer is written by
greedy generation if each of its tokens has a probability above one half. For numbers to publish,
run `vlmeval` on the saved folder.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from hipp_ext.calibration import Batch, check_processor, image_token_id
from hipp_ext.errors import CalibrationError
from hipp_ext.evals.candidates import CandidateTask, Question
from hipp_ext.evals.references import Reference, References, ReferenceTask
from hipp_ext.evals.statistics import clustered_mean_se, mean_of_means_se
from hipp_ext.groups import Tower, check_towers
from hipp_ext.image_attacks import ImageAttack

YES_BIAS_WEIGHT = 0.5
ROBUSTNESS = ("pope", "adversarial", "both")


class Evaluator:
    """`evaluator(model)` -> {"utility", "robustness", ...} for `HiPPPlanner.fit`; the same
    questions at every call.

    Utility is the margin on `choice` (`TaskScores`). With `references` it is the mean of that
    margin and of the probability of the reference answers: the geometric mean of the probabilities
    of an answer's tokens, exp(log-likelihood per token), averaged over the answers
    (`ReferenceScores`). Without `choice` it is that probability alone. The end of an answer is not
    part of it, so a model that goes on talking loses nothing.

    Robustness is the margin on `pope`, in which the questions with the answer Yes weigh as much as
    those with No, minus YES_BIAS_WEIGHT times the distance between the probability of "Yes" and one
    half. So a model gains nothing by preferring one answer, also where a table lists an absent
    thing once for each kind of absence and a present one once, as VLMEvalKit's POPE does.

    Everything before the language tower is computed once, for `model`. Later calls take that model,
    masked or pruned in its language tower; with other `towers`, in those too, and then everything
    is computed at every call.

    Args:
        model: the dense model.
        processor: the processor of the model.
        pope: yes/no questions (`labels` Yes and No).
        choice: multiple-choice questions; may be empty if there are references.
        references: open questions (prompt, image and answer, no candidates), such as captions; or
            `References`, which `References.from_file` reads from chats and tables.
        batch_size: number of rows per forward pass.
        robustness: images that the objective is measured on: "pope" (unchanged images),
            "adversarial" (images that `attack` changed once, against the dense model; as fast per
            plan), or "both" (the mean of the two).
        adaptive: attack the model of every plan instead. It takes longer by the attack, and it is
            what a deployed model would face; attacks on the dense model are weaker against a pruned
            one.
        attack: maps (model, batch with labels) to a batch with other pixel_values. Default: PGD
            with ten steps and a maximum change of 4/255 per pixel.
        towers: towers that the plans prune: "language", "vision", "projector".

    Attributes:
        towers: the same.
        digest: hash of the questions, their images and answers, `robustness` and `adaptive`. The
            attack's settings are not part of it.

    Raises:
        CalibrationError: the model takes no images, there are no questions for an objective,
            `robustness` is unknown, a POPE question is not yes/no, the processor is that of another
            model, two candidates begin with the same token, or a reference has no answer.
        UnsupportedModelError: answers cannot be replayed; see `AnswerLogits`, `AnswerLikelihood`.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        pope: Iterable[Question],
        choice: Iterable[Question],
        *,
        references: Iterable[Reference] | References = (),
        batch_size: int = 64,
        robustness: str = "pope",
        attack: Callable[[nn.Module, Batch], Batch] | None = None,
        adaptive: bool = False,
        towers: Sequence[Tower] = ("language",),
    ):
        self.towers = check_towers(towers)
        whole = self.towers != ("language",)
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
        if not isinstance(references, References):
            references = References.of(processor, references, batch_size)
        if not pope or not (choice or references.batches):
            raise CalibrationError(
                "The evaluator needs at least one question of each task: POPE for robustness; "
                "multiple choice, references or both for utility."
            )
        if any(tuple(q.labels) != ("Yes", "No") for q in pope):
            raise CalibrationError(
                "The candidates of every POPE question must be Yes and No; were the two tasks "
                "swapped?"
            )
        self._tasks: dict[str, CandidateTask] = {}
        if choice:
            self._tasks["choice"] = CandidateTask(model, processor, choice, batch_size, whole=whole)
        if robustness != "adversarial":
            self._tasks["pope"] = CandidateTask(model, processor, pope, batch_size, whole=whole)
        if robustness != "pope":
            attack = attack or ImageAttack(processor, epsilon=4 / 255, steps=10)
            self._tasks["pope_attacked"] = CandidateTask(
                model, processor, pope, batch_size, attack, adaptive, whole
            )
        self._references = None
        if references.batches:
            self._references = ReferenceTask(model, references, whole)
        asked = [f"{name} {task.digest}" for name, task in self._tasks.items()]
        if self._references is not None:
            asked.append(f"references {self._references.digest}")
        self.digest = hashlib.sha256(f"{asked} {adaptive} balanced".encode()).hexdigest()

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Utility and robustness, their standard errors, the accuracies [%], and with references
        "reference_likelihood", the mean log-likelihood of their tokens [nats per token].

        A standard error is left out if all questions of a task are about one image. That of utility
        counts choices and references about one image together.
        """
        answers = {name: task.log_probabilities(model) for name, task in self._tasks.items()}
        scores = {name: self._tasks[name].scores(p) for name, p in answers.items()}
        likelihoods = self._references and self._references.likelihoods(model)
        utility = self._utility(answers.get("choice"), likelihoods)
        asked = [name for name in self._tasks if name != "choice"]
        margins = {n: self._tasks[n].balanced_margins(answers[n]) for n in asked}
        robust = [
            float(margins[n].mean()) - YES_BIAS_WEIGHT * abs(self._tasks[n].yes_bias(answers[n]))
            for n in asked
        ]
        errors = {
            "utility_se": mean_of_means_se(utility),
            # The same questions twice are not independent: the larger error, not one divided by the
            # root of two.
            "robustness_se": max(
                clustered_mean_se(margins[n], self._tasks[n].clusters) for n in asked
            ),
        }
        measured = {
            "utility": sum(float(values.mean()) for values, _ in utility) / len(utility),
            "robustness": sum(robust) / len(robust),
            **{name: error for name, error in errors.items() if math.isfinite(error)},
            **{f"{name}_accuracy": own.accuracy for name, own in scores.items()},
        }
        if likelihoods is not None:
            measured["reference_likelihood"] = float(likelihoods.mean())
        return measured

    def _utility(
        self, choice: Tensor | None, likelihoods: Tensor | None
    ) -> list[tuple[np.ndarray, list[str]]]:
        """What utility is the mean of: a value per row and its cluster, for each kind of row."""
        parts = []
        if choice is not None:
            task = self._tasks["choice"]
            parts.append((task.margins(choice), task.clusters))
        if self._references is not None and likelihoods is not None:
            probabilities = self._references.probabilities(likelihoods)
            parts.append((probabilities, list(self._references.clusters)))
        return parts

    def scores(self, model: nn.Module) -> dict[str, Any]:
        """The scores of what is asked: `TaskScores` of "choice", "pope" and "pope_attacked",
        `ReferenceScores` of "references".
        """
        found: dict[str, Any] = {
            name: task.scores(task.log_probabilities(model)) for name, task in self._tasks.items()
        }
        if self._references is not None:
            found["references"] = self._references.scores(self._references.likelihoods(model))
        return found


def search_evaluator(
    model: nn.Module,
    processor: Any,
    n: int,
    split: str = "search",
    robustness: str = "pope",
    references: Iterable[Reference] | References = (),
    towers: Sequence[Tower] = ("language",),
) -> Evaluator:
    """The evaluator on the testbed: `n` POPE and `n` ScienceQA questions of a split.

    Args:
        model, processor: see `Evaluator`.
        n: number of questions per task.
        split: split of the testbed.
        robustness, references, towers: see `Evaluator`.
    """
    from hipp_ext import testbed

    pope, choice = testbed.questions("POPE", split, n), testbed.questions("ScienceQA", split, n)
    return Evaluator(
        model, processor, pope, choice, references=references, robustness=robustness, towers=towers
    )
