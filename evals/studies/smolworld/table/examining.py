"""Asks models the questions of a split; what does not depend on the model is computed once."""

from collections.abc import Sequence
from typing import Any

import torch

from hipp_ext.calibration import Batch, encode
from hipp_ext.evals.evaluator import Evaluator
from hipp_ext.evals.studies.smolworld.evaluation import BATCH, write_from
from hipp_ext.evals.studies.smolworld.quiz import Question
from hipp_ext.evals.studies.smolworld.table.asked import Paper
from hipp_ext.evals.studies.smolworld.table.rates import Values
from hipp_ext.likelihood import AnswerLikelihood

TOGETHER = 64  # questions per forward pass


class Examiner:
    """`examiner(model)` returns a model's answers to a paper.

    Pictures go through the tower of `model` once. Later calls take that model, or copies that were
    pruned or quantised in their language tower. A model whose tower, projector or embeddings
    changed needs an examiner of its own.

    Args:
        model: the model.
        processor: its processor.
        paper: the questions.
    """

    def __init__(self, model: Any, processor: Any, paper: Paper):
        self._processor = processor
        self._tasks = Evaluator(model, processor, paper.pope, paper.choice, batch_size=TOGETHER)
        # A token that is written costs a pass of the weights, however many rows there are.
        self._prompts = _batches(processor, paper.captions, TOGETHER, answers=False)
        self._likelihood = AnswerLikelihood(
            model, _batches(processor, paper.captions, BATCH, answers=True)
        )

    @torch.no_grad()
    def __call__(self, model: Any) -> Values:
        """Answers: "pope" and "choice" (a letter per question), "captions" (texts), and "loss" of
        the right captions [nats per token]."""
        scores = self._tasks.scores(model)
        return {
            **{name: "".join(a[0] for a in scores[name].answers) for name in ("pope", "choice")},
            "captions": write_from(model, self._processor, self._prompts),
            "loss": [round(-value, 6) for value in self._likelihood(model).tolist()],
        }


def _batches(processor: Any, asked: Sequence[Question], size: int, *, answers: bool) -> list[Batch]:
    """Batches of prompts, or of prompts with their answers."""
    found = []
    for first in range(0, len(asked), size):
        rows = asked[first : first + size]
        given = [q.answer for q in rows] if answers else None
        found.append(encode(processor, [q.prompt for q in rows], [q.image for q in rows], given))
    return found
