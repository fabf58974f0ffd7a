"""Open questions with a reference answer, scored by how likely a model finds that answer."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.calibration import Batch, batches_digest, encode
from hipp_ext.calibration.batches import check_batch
from hipp_ext.calibration.reading import ROWS, Reader, make_reader, warn_left_out
from hipp_ext.errors import CalibrationError
from hipp_ext.evals.statistics import clustered_mean_se
from hipp_ext.files.untrusted import shown
from hipp_ext.likelihood import AnswerLikelihood
from hipp_ext.quantities import whole_option


@runtime_checkable
class Reference(Protocol):
    """The fields of an open question; the testbed's captions have them.

    A `picture`, if there is one, identifies the image: questions about one image form a cluster.
    """

    @property
    def prompt(self) -> str:
        """Text of the user's turn."""
        ...

    @property
    def image(self) -> Any:
        """A PIL image, or None."""
        ...

    @property
    def answer(self) -> str:
        """The reference answer."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class References:
    """Reference answers as batches of one processor.

    Attributes:
        batches: inputs of the model's forward, with labels on the answers.
        order: place of each row of the batches among the rows as they were given.
        clusters: rows with the same pictures have the same text; in the order of the batches.
        skipped: rows of the user's file that were left out, one line each with the reason.
    """

    batches: tuple[Batch, ...]
    order: tuple[int, ...]
    clusters: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, processor: Any, questions: Iterable[Reference], batch_size: int = 64
    ) -> "References":
        """The questions through the processor's chat template.

        Args:
            processor: processor of the model.
            questions: open questions with their answers.
            batch_size: number of rows per batch.

        Raises:
            CalibrationError: an answer has no text.
        """
        asked = tuple(questions)
        for number, question in enumerate(asked):
            if not question.answer.strip():
                raise CalibrationError(f"Reference {number} has an empty answer.")

        def kind(i: int) -> tuple[bool, int]:
            # Rows of similar length in one batch need less padding.
            return asked[i].image is None, len(asked[i].prompt) + len(asked[i].answer)

        order = sorted(range(len(asked)), key=kind)
        silent = sum(question.image is None for question in asked)
        parts = order[: len(asked) - silent], order[len(asked) - silent :]
        chunks = [p[i : i + batch_size] for p in parts for i in range(0, len(p), batch_size)]
        return cls(
            batches=tuple(answered(processor, [asked[i] for i in chunk]) for chunk in chunks),
            order=tuple(order),
            clusters=tuple(getattr(asked[i], "picture", None) or _own(i) for i in order),
        )

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        processor: Any,
        *,
        image_folder: str | Path | None = None,
        rows: int | None = None,
        sequence_length: int | None = None,
        batch_size: int = 16,
    ) -> "References":
        """The chats or table rows of a file: all turns before the last answer that fits, and it.

        The kinds of files, the other arguments and the errors are those of
        `Calibration.from_file`.

        Warns:
            UserWarning: rows were left out, how many and why; texts and rows without an answer are
                among them.
        """
        file = Path(path)
        reader = make_reader(
            file,
            processor,
            image_folder=image_folder,
            sequence_length=sequence_length,
            batch_size=batch_size,
            answered=True,
        )
        return _read(
            file, reader, whole_option("rows", ROWS if rows is None else rows, CalibrationError, 1)
        )


def _read(file: Path, reader: Reader, rows: int) -> References:
    fitting, left_out = reader.read(file, rows)
    warn_left_out(left_out, len(fitting), file, "references")
    groups = reader.groups(fitting)
    order = [i for own in groups for i in own]
    return References(
        batches=tuple(reader.batch([fitting[i] for i in own]) for own in groups),
        order=tuple(order),
        clusters=tuple(_seen(reader.pictures(fitting[i].sources)) or _own(i) for i in order),
        skipped=tuple(f"{shown(file)}, {line}" for line in left_out),
    )


def _seen(pictures: Sequence[Any]) -> str:
    """A text that identifies pictures; empty where there are none."""
    if not pictures:
        return ""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(f"{picture.size}".encode() + picture.tobytes())
    return digest.hexdigest()


def _own(row: int) -> str:
    """The cluster of a row without a picture."""
    return f"reference {row}"


def answered(processor: Any, questions: Sequence[Reference]) -> Batch:
    """The questions as one batch with labels, which are the answers."""
    prompts, images, answers = (
        [getattr(q, a) for q in questions] for a in ("prompt", "image", "answer")
    )
    return encode(processor, prompts, images, answers)


@dataclass(frozen=True, kw_only=True)
class ReferenceScores:
    """How likely a model finds reference answers.

    Attributes:
        n: number of answers.
        likelihood: mean over the answers of the log-likelihood per token [nats per token]; 0 is
            certain, and higher is better.
        likelihood_se: its standard error. Answers about one picture form a cluster. NaN for a
            single cluster.
        probability: mean over the answers of the geometric mean of the probabilities of an
            answer's tokens, exp(log-likelihood per token), from 0 to 1. A single answer that the
            model finds impossible moves it by no more than 1/n, unlike the likelihood.
        probability_se: its standard error.
        likelihoods: the log-likelihood per token of each answer, in the order of the references.
    """

    n: int
    likelihood: float
    likelihood_se: float
    probability: float
    probability_se: float
    likelihoods: tuple[float, ...]


class ReferenceTask:
    """Reference answers and the model that they are measured on.

    Args:
        model: the dense model.
        references: the answers.
        whole: plans may change what comes before the language tower, see `AnswerLikelihood`.

    Attributes:
        clusters: the cluster of each answer, in the order of `likelihoods`.
        digest: hash of the batches.

    Raises:
        CalibrationError: the batches do not fit the model.
        UnsupportedModelError: see `AnswerLikelihood`.
    """

    def __init__(self, model: nn.Module, references: References, whole: bool = False):
        for index, batch in enumerate(references.batches):
            check_batch(model, batch, index)
        self._likelihood = AnswerLikelihood(model, references.batches, whole=whole)
        self._order = references.order
        self.clusters = references.clusters
        self.digest = batches_digest(references.batches)

    def likelihoods(self, model: nn.Module) -> Float[Tensor, " answers"]:
        """Log-likelihood of each answer [nats per token], in the order of the batches."""
        return self._likelihood(model)

    def probabilities(self, likelihoods: Tensor) -> np.ndarray:
        """Geometric mean of the probabilities of each answer's tokens."""
        return likelihoods.exp().numpy()

    def scores(self, likelihoods: Tensor) -> ReferenceScores:
        """The scores of a model with these likelihoods."""
        probabilities = self.probabilities(likelihoods)
        given = likelihoods[torch.argsort(torch.tensor(self._order))]
        return ReferenceScores(
            n=len(likelihoods),
            likelihood=float(likelihoods.mean()),
            likelihood_se=clustered_mean_se(likelihoods.numpy(), self.clusters),
            probability=float(probabilities.mean()),
            probability_se=clustered_mean_se(probabilities, self.clusters),
            likelihoods=tuple(given.tolist()),
        )
