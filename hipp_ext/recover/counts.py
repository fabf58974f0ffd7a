"""Over how many positions the losses of a batch are means."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hipp_ext.calibration import Batch


class Counts(NamedTuple):
    """Two numbers of positions, or two weights of the means over them.

    Attributes:
        learnt: of the positions that are learnt from: a mean over these is every loss but the
            cross-entropy of a distillation.
        answered: of those among them that predict a label: the cross-entropy is a mean over these.
    """

    learnt: float
    answered: float

    def of(self, name: str) -> float:
        """The number that belongs to a loss."""
        return self.answered if name == "cross_entropy" else self.learnt

    def shares(self, whole: Sequence[float]) -> "Counts":
        """The fractions of a whole; of nothing, zero."""
        learnt, answered = (own / (all_ or 1) for own, all_ in zip(self, whole, strict=True))
        return Counts(learnt, answered)


WHOLE = Counts(1.0, 1.0)


def summed(counts: Iterable[Counts]) -> Counts:
    """The sums of the numbers."""
    found = list(counts)
    return Counts(sum(c.learnt for c in found), sum(c.answered for c in found))


def counted_labels(batch: Batch) -> int:
    """Labels of a batch that a token before them predicts."""
    return int((batch["labels"][:, 1:] != -100).sum()) if "labels" in batch else 0
