"""Two models on the same questions: is the difference real, and how many questions would show a smaller one?

Both models answer the same questions, so what is compared is question by question, which needs far fewer questions than
comparing two accuracies with their error bars. And questions about one picture go wrong together: the intervals and
p-values here draw whole pictures, except McNemar's test, which takes questions as independent. Where a picture has
several questions, as in POPE, McNemar's p is too small as a rule, and is there to be compared with other people's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from hipp_ext.evals.metrics import cluster_resamples, cluster_sums

RESAMPLES = 5000
_MOST = 10**15  # questions; beyond it floats no longer count one by one


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its bootstrap error bar, all in the number's unit; the error bar is NaN for fewer than two clusters.

    Attributes:
        value: the number, from all rows.
        se: standard error.
        low, high: percentile interval.
        p_value: two-sided, of the number being 0; below 1 - level exactly where the interval leaves 0 out, but for ties.
    """

    value: float
    se: float
    low: float
    high: float
    p_value: float


def bootstrap_estimate(
    counts: np.ndarray,
    clusters: Sequence[str],
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """One statistic of column sums, with its error bar from a bootstrap over clusters.

    Args:
        counts: shape (rows, k).
        clusters: the cluster (image) of each row.
        statistic: column sums, shape (..., k), to the statistic, shape (...).
        level: of the interval, in (0, 1).
        seed, resamples: of the bootstrap.

    Raises:
        ValueError: see `cluster_resamples`; or `level` is not in (0, 1).

    Source: Efron and Tibshirani (1993), sections 13.3 (percentile interval) and 15.4 (the p-value that goes with it;
    one is added to both counts, as in Davison and Hinkley (1997), section 4.2, so that it is never 0).
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), not {level}")
    value = float(statistic(np.asarray(counts, dtype=float).sum(axis=0)))
    drawn = cluster_resamples(
        counts, clusters, lambda s: statistic(s)[..., None], seed=seed, resamples=resamples
    )[:, 0]
    if np.isnan(drawn).any():
        return Estimate(value=value, se=math.nan, low=math.nan, high=math.nan, p_value=math.nan)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    beyond = min(np.sum(drawn <= 0), np.sum(drawn >= 0))
    p_value = min(1.0, 2 * (beyond + 1) / (resamples + 1))
    return Estimate(
        value=value,
        se=float(drawn.std(ddof=1)),
        low=float(low),
        high=float(high),
        p_value=float(p_value),
    )


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """How two models compare on the same questions. Rates and differences are percentages and points, [0, 100].

    Attributes:
        n: questions.
        clusters: pictures (or questions, where each stands alone), over which the error bars are taken.
        a, b: accuracy of the models. Higher is better.
        difference: b - a, with error bar.
        only_a, only_b: questions that only this model answers right (the discordant ones).
        mcnemar_p: exact McNemar test, two-sided; questions taken as independent.
        design_effect: how many times more questions the clusters cost than independent ones would; NaN if nothing is
            discordant or there are fewer than two clusters.
    """

    n: int
    clusters: int
    a: float
    b: float
    difference: Estimate
    only_a: int
    only_b: int
    mcnemar_p: float
    design_effect: float

    @property
    def discordance(self) -> float:
        """Questions that exactly one of the models answers right [%]."""
        return 100 * (self.only_a + self.only_b) / self.n


def paired_difference(
    right_a: Sequence[bool],
    right_b: Sequence[bool],
    clusters: Sequence[str] | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> PairedDifference:
    """Accuracy of B less accuracy of A on the same questions.

    Args:
        right_a, right_b: whether each model is right, question by question.
        clusters: the picture of each question; None takes every question as its own.
        level, seed, resamples: see `bootstrap_estimate`.

    Raises:
        ValueError: the sequences differ in length or are empty.
    """
    a, b = np.asarray(right_a, dtype=float), np.asarray(right_b, dtype=float)
    clusters = [str(n) for n in range(len(a))] if clusters is None else clusters
    if not len(a) == len(b) == len(clusters) > 0:
        raise ValueError(
            f"one length, above 0, is needed; got {len(a)}, {len(b)} and {len(clusters)}"
        )
    gain, n = b - a, len(a)
    counts = np.stack([gain, np.ones(n)], axis=1)
    difference = bootstrap_estimate(
        counts,
        clusters,
        lambda s: 100 * s[..., 0] / s[..., 1],
        level=level,
        seed=seed,
        resamples=resamples,
    )
    only_a, only_b = int((gain < 0).sum()), int((gain > 0).sum())
    spread = gain.var() / n
    return PairedDifference(
        n=n,
        clusters=len(set(clusters)),
        a=100 * float(a.mean()),
        b=100 * float(b.mean()),
        difference=difference,
        only_a=only_a,
        only_b=only_b,
        mcnemar_p=mcnemar_p(only_a, only_b),
        design_effect=clustered_mean_se(gain, clusters) ** 2 / spread if spread else math.nan,
    )


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Two-sided p of the exact McNemar test: each discordant question is a fair coin if the models are equally good.

    Source: McNemar, Psychometrika 12 (1947); the exact binomial form as in Agresti, Categorical Data Analysis, 10.1.

    Raises:
        ValueError: a count is negative, or more than 10^15 together.
    """
    from scipy.stats import binomtest

    if only_a < 0 or only_b < 0:
        raise ValueError(f"discordant counts cannot be negative: {only_a} and {only_b}")
    if only_a + only_b > _MOST:
        raise ValueError(f"discordant counts can be {_MOST:,} together, and are more")
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0


def clustered_mean_se(values: np.ndarray, clusters: Sequence[str]) -> float:
    """Standard error of the mean of `values` when whole clusters are drawn, in closed form; NaN below two clusters.

    Source: Cochran, Sampling Techniques (3rd ed., 1977), section 6.3: the mean as a ratio of cluster totals, linearised.
    """
    values = np.asarray(values, dtype=float)
    sums = cluster_sums(np.stack([values, np.ones(len(values))], axis=1), clusters)
    k = len(sums)
    if k < 2:
        return math.nan
    residuals = sums[:, 0] - values.mean() * sums[:, 1]
    return math.sqrt(k / (k - 1) * float(np.sum(residuals**2))) / len(values)


def questions_needed(
    difference: float,
    discordance: float,
    *,
    power: float = 0.8,
    alpha: float = 0.05,
    design_effect: float = 1.0,
) -> int:
    """How many questions show a true difference between two models with the wanted power, by McNemar's test.

    Args:
        difference: true difference of the accuracies [points], not 0; its sign does not matter.
        discordance: questions that exactly one of the models answers right [%]; at least the difference.
        power: probability of seeing the difference, in (0, 1).
        alpha: two-sided level of the test, in (0, 1).
        design_effect: as `PairedDifference` has it; multiplies the number.

    Raises:
        ValueError: an argument is outside its range; a difference above the discordance is impossible; one so small that
            10^15 questions would not show it.

    Source: Connor, "Sample size for testing differences in proportions for the paired-sample design", Biometrics 43
    (1987), 207-211, for the test without continuity correction; the exact test needs a little more. The design effect:
    Kish, Survey Sampling (1965), section 8.2.
    """
    delta, psi = abs(difference) / 100, discordance / 100
    if not 0 < delta <= psi <= 1:
        raise ValueError(
            f"0 < difference <= discordance <= 100 is needed, not {difference} and {discordance}"
        )
    if not (0 < power < 1 and 0 < alpha < 1 and design_effect > 0):
        raise ValueError(
            f"power and alpha must be in (0, 1), design_effect above 0: {power}, {alpha}, {design_effect}"
        )
    quantile = NormalDist().inv_cdf
    wanted = quantile(1 - alpha / 2) * math.sqrt(psi) + quantile(power) * math.sqrt(psi - delta**2)
    needed = math.sqrt(design_effect) * wanted / delta  # its square may be more than a float holds
    if not needed <= math.sqrt(_MOST):
        raise ValueError(
            f"more than {_MOST:,} questions would be needed for a difference of {difference} points"
        )
    return math.ceil(design_effect * (wanted / delta) ** 2)
