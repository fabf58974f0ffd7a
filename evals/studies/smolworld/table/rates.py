"""Answers -> rates, and contrasts of several models on the same questions, with standard errors.

A contrast is a weighted sum of the models' rates: one model alone (weight 1), a difference (1 and
-1), a mean over seeds, or a difference of differences. All of them come from one bootstrap, which
draws whole pictures for all models together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from hipp_ext.evals.chair import ObjectWords, default_synonyms
from hipp_ext.evals.pope import SPLITS
from hipp_ext.evals.statistics import cluster_sums, clustered_se, ratio
from hipp_ext.evals.studies.smolworld.table.asked import Asked

Values = Mapping[str, Any]  # "pope", "choice": a letter per question; "captions", "loss": lists
Term = tuple[float, Values]  # weight and answers of a model
PARTS = ("overall", *SPLITS)
RESAMPLES = 1000
# Which of POPE's rates are measured of every split.
POPE_RATES = ("accuracy", "F1", "yes", "false yes")
CAPTION_RATES = ("CHAIR_i", "CHAIR_s", "recall", "mentions", "silent", "loss")
CHOICES = ("choice", "choice with picture", "choice without picture")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A contrast with its standard error, in percentage points; of "mentions" in objects per
    caption, of "loss" in nats per token."""

    value: float
    se: float


class _Task(Protocol):
    clusters: list[str]

    @property
    def names(self) -> tuple[str, ...]: ...

    def counts(self, values: Values) -> np.ndarray:
        """(rows, columns) what each row adds to the sums that the rates are made from."""
        ...

    def rates(self, sums: np.ndarray) -> np.ndarray:
        """(..., columns) -> (..., names)."""
        ...


class Rates:
    """All rates of models that were asked the same.

    Args:
        asked: what they were asked.
        resamples: resamples of the bootstrap.
        seed: its random seed.
    """

    def __init__(self, asked: Asked, *, resamples: int = RESAMPLES, seed: int = 0):
        self.resamples, self.seed = resamples, seed
        self._tasks: tuple[_Task, ...] = (_Pope(asked), _Choice(asked), _Captions(asked))

    def contrast(self, terms: Sequence[Term]) -> dict[str, Measured]:
        """Rate -> the weighted sum over the models, with its standard error.

        Lower is better of "false yes", CHAIR and "loss"; "yes" is the share of questions that are
        answered so, and half of them should be.
        """
        found: dict[str, Measured] = {}
        weights = [weight for weight, _ in terms]
        for task in self._tasks:
            # Pictures are added up first: they are drawn whole.
            sums = [cluster_sums(task.counts(values), task.clusters) for _, values in terms]

            def statistic(drawn: np.ndarray, task: _Task = task) -> np.ndarray:
                own = np.split(drawn, len(weights), axis=-1)
                rates = [w * task.rates(s) for w, s in zip(weights, own, strict=True)]
                return np.sum(rates, axis=0)

            rows = np.concatenate(sums, axis=1)
            clusters = list(map(str, range(len(rows))))
            errors = clustered_se(
                rows, clusters, statistic, seed=self.seed, resamples=self.resamples
            )
            for name, value, error in zip(task.names, statistic(rows.sum(0)), errors, strict=True):
                found[name] = Measured(value=float(value), se=float(error))
        return found


def changed(asked: Asked, wide: Values, narrow: Values) -> dict[str, Any]:
    """What a narrow type changes: the share of answers that differ, and rates minus the wide ones.

    Args:
        asked: the questions.
        wide, narrow: the answers of one model in two types.
    """
    change = Rates(asked).contrast([(1, narrow), (-1, wide)])
    return {
        "answers that differ [%]": {
            name: 100 * sum(map(str.__ne__, wide[name], narrow[name])) / len(wide[name])
            for name in ("pope", "choice", "captions")
        },
        "minus float32": {
            name: [round(change[name].value, 4), round(change[name].se, 4)]
            for name in ("POPE accuracy overall", "POPE F1 overall", "choice", "loss")
        },
    }


class _Pope:
    """A question counts once for each split that it belongs to, as in VLMEvalKit."""

    def __init__(self, asked: Asked):
        self.names = tuple(f"POPE {rate} {part}" for part in PARTS for rate in POPE_RATES)
        self.clusters = [picture for _, _, picture in asked.pope]
        self._yes = np.array([answer == "Yes" for answer, _, _ in asked.pope])
        member = [[split in kinds.split(",") for split in SPLITS] for _, kinds, _ in asked.pope]
        of_split = np.array(member, dtype=float)
        self._weights = np.concatenate([of_split.sum(1, keepdims=True), of_split], axis=1)

    def counts(self, values: Values) -> np.ndarray:
        said = np.array(list(values["pope"])) == "Y"
        hit, false = said & self._yes, said & ~self._yes
        own = [np.ones(len(said)), hit, false, said == self._yes, said, ~self._yes]
        columns = np.stack(own, axis=1)[:, None] * self._weights[:, :, None]
        return columns.reshape(len(said), -1)

    def rates(self, sums: np.ndarray) -> np.ndarray:
        own = np.asarray(sums).reshape(*sums.shape[:-1], len(PARTS), 6)
        n, hit, false, right, said, absent = np.moveaxis(own, -1, 0)
        missed = n - absent - hit
        shares = (
            ratio(right, n),
            ratio(2 * hit, 2 * hit + false + missed),
            ratio(said, n),
            ratio(false, absent),
        )
        return 100 * np.stack(shares, axis=-1).reshape(*sums.shape[:-1], -1)


class _Choice:
    names = CHOICES

    def __init__(self, asked: Asked):
        self.clusters = [picture for _, _, picture in asked.choice]
        self._right = np.array([answer for answer, _, _ in asked.choice])
        pictured = np.array([relation.startswith("picture") for _, relation, _ in asked.choice])
        self._weights = np.stack([np.ones(len(pictured)), pictured, ~pictured], axis=1)

    def counts(self, values: Values) -> np.ndarray:
        hits = np.array(list(values["choice"])) == self._right
        return np.concatenate([self._weights, hits[:, None] * self._weights], axis=1)

    def rates(self, sums: np.ndarray) -> np.ndarray:
        n, hits = np.split(sums, 2, axis=-1)
        return 100 * ratio(hits, n)


class _Captions:
    names = CAPTION_RATES

    def __init__(self, asked: Asked):
        self.clusters = [picture for _, picture in asked.captions]
        self._shown = [set(objects) for objects, _ in asked.captions]
        self._words = ObjectWords(default_synonyms(asked.names))

    def counts(self, values: Values) -> np.ndarray:
        rows = []
        for text, shown, loss in zip(values["captions"], self._shown, values["loss"], strict=True):
            named = self._words(text)
            wrong = sum(name not in shown for name in named)
            found = len(shown & set(named))
            rows.append((1, len(named), wrong, wrong > 0, found, len(shown), not named, loss))
        return np.array(rows, dtype=float)

    def rates(self, sums: np.ndarray) -> np.ndarray:
        n, named, wrong, with_wrong, found, shown, silent, loss = np.moveaxis(sums, -1, 0)
        percent = [(wrong, named), (with_wrong, n), (found, shown)]
        shares = [100 * ratio(part, whole) for part, whole in percent]
        others = [ratio(named, n), 100 * ratio(silent, n), ratio(loss, n)]
        return np.stack([*shares, *others], axis=-1)
