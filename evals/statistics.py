"""Standard errors of benchmark scores, and the comparison of two models that answer the same
questions.

A benchmark asks several questions about one image, and a model that misreads the image misses them
together. So rows are not independent, and an error bar that counts rows is too small: the bootstrap
here draws whole images.

Two models are compared question by question, which needs far fewer questions than a comparison of
two accuracies with their error bars. McNemar's test takes questions as independent. Where an image
has several questions, as in POPE, its p-value is usually too small; it is given because other
people report it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

RESAMPLES = 5000
MAX_QUESTIONS = 10**15  # larger numbers are no longer exact as floats
_BLOCK = 64  # resamples per draw; the memory needed is 64 x clusters for a benchmark of any size


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, elementwise; 0 where `whole` is 0."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def f1_percent(hits: np.ndarray, misses: np.ndarray) -> np.ndarray:
    """F1 [%] from the numbers of true positives and of wrong answers of both kinds; 0 where both
    are 0.
    """
    return 100 * ratio(2 * hits, 2 * hits + misses)


def binomial_se(percent: float, n: int) -> float:
    """Standard error [percentage points] of a share [0, 100] of n independent rows; NaN if n is 0.

    It is 0 at 0 and at 100, where no spread was measured. That is not certainty.
    """
    share = percent / 100
    return 100 * math.sqrt(share * (1 - share) / n) if n else math.nan


def without_nan(value: Any) -> Any:
    """Numbers in nested dicts, with None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {name: without_nan(own) for name, own in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def cluster_sums(counts: np.ndarray, clusters: Sequence[str]) -> np.ndarray:
    """Column sums of each cluster in the order of first rows, shape (clusters, k)."""
    counts = np.asarray(counts, dtype=float)
    ids = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(ids), counts.shape[1]))
    np.add.at(sums, [ids[cluster] for cluster in clusters], counts)
    return sums


def cluster_resamples(
    counts: np.ndarray,
    clusters: Sequence[str],
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> np.ndarray:
    """The statistics of each resample of a bootstrap that draws whole clusters with replacement.

    Args:
        counts: what each row adds to each of k sums, shape (rows, k).
        clusters: the cluster (image) of each row.
        statistic: maps column sums, shape (..., k), to statistics, shape (..., m).
        seed: random seed of the draws.
        resamples: number of resamples, at least 2.

    Returns:
        Shape (resamples, m), in the unit of `statistic`; NaN with fewer than two clusters.

    Raises:
        ValueError: rows and clusters differ in number, or there are fewer than 2 resamples.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 6; clusters as in
    Field and Welsh, "Bootstrapping clustered data" (2007), section 3.
    """
    counts = np.asarray(counts, dtype=float)
    if len(counts) != len(clusters):
        raise ValueError(f"{len(counts)} rows of counts, but {len(clusters)} clusters")
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, not {resamples}")
    sums = cluster_sums(counts, clusters)
    if len(sums) < 2:
        return np.full((resamples, *np.asarray(statistic(counts.sum(axis=0))).shape), math.nan)
    rng, drawn = np.random.default_rng(seed), []
    shares = np.full(len(sums), 1 / len(sums))
    for start in range(0, resamples, _BLOCK):
        block = min(_BLOCK, resamples - start)
        drawn.append(statistic(rng.multinomial(len(sums), shares, size=block) @ sums))
    return np.concatenate(drawn)


def clustered_se(
    counts: np.ndarray,
    clusters: Sequence[str],
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> np.ndarray:
    """Standard errors of statistics of column sums, by a bootstrap that draws whole clusters with
    replacement.

    Returns:
        Shape (m,), in the unit of `statistic`; NaN with fewer than two clusters.

    Arguments, errors and source as `cluster_resamples`.
    """
    drawn = cluster_resamples(counts, clusters, statistic, seed=seed, resamples=resamples)
    return drawn.std(axis=0, ddof=1)


def rates_with_errors(
    counts: np.ndarray,
    clusters: Sequence[str],
    names: Sequence[str],
    rates: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int,
    resamples: int,
    errors: bool = True,
) -> dict[str, float]:
    """The rates by name, and their standard errors under the names with `_se`.

    Args:
        counts: what each row adds to each of k sums, shape (rows, k).
        clusters: the cluster (image) of each row.
        names: the names of the m rates.
        rates: maps column sums, shape (..., k), to rates, shape (..., m).
        seed: random seed of the bootstrap over clusters.
        resamples: number of resamples.
        errors: whether to compute the standard errors, which need a bootstrap.
    """
    values = rates(counts.sum(axis=0))
    found = {name: float(value) for name, value in zip(names, values, strict=True)}
    if not errors:
        return found
    spread = clustered_se(counts, clusters, rates, seed=seed, resamples=resamples)
    return found | {f"{name}_se": float(error) for name, error in zip(names, spread, strict=True)}


def whole_groups(
    correct: Sequence[bool], groups: Sequence[str], size: int | None = None
) -> np.ndarray:
    """For each row, shape (rows, 2): 1 in the first row of its group, and 1 there if all rows of
    the group are correct. Sums of the columns are the number of groups and of those answered
    wholly.

    Args:
        correct: whether each row is correct.
        groups: the group of each row.
        size: number of rows of a complete group; groups of another size count as 0. None: any.
    """
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    counts = np.zeros((len(groups), 2))
    for own in rows.values():
        if size in (None, len(own)):
            counts[own[0]] = 1, all(correct[row] for row in own)
    return counts


def clustered_mean_se(values: np.ndarray, clusters: Sequence[str]) -> float:
    """Standard error of the mean of `values` when whole clusters are drawn, in closed form; NaN
    below two clusters.

    Source: Cochran, Sampling Techniques (3rd ed., 1977), section 6.3: the mean as a ratio of
    cluster totals, linearised.
    """
    return mean_of_means_se([(values, clusters)])


def mean_of_means_se(samples: Sequence[tuple[np.ndarray, Sequence[str]]]) -> float:
    """Standard error of the mean of the samples' means when whole clusters are drawn, in closed
    form; NaN if a sample has fewer than two clusters.

    A cluster that several samples have is drawn once for all of them, so what moves their means
    together is counted. Without common clusters it is the root of the sum of the samples' squared
    standard errors, divided by their number.

    Args:
        samples: the values and the cluster of each value, for every sample.

    Source: as `clustered_mean_se`, with the linearised residuals added over the samples.
    """
    residuals: dict[str, float] = {}
    for given, clusters in samples:
        values = np.asarray(given, dtype=float)
        sums = cluster_sums(np.stack([values, np.ones(len(values))], axis=1), clusters)
        k = len(sums)
        if k < 2:
            return math.nan
        weight = math.sqrt(k / (k - 1)) / len(values) / len(samples)
        own = weight * (sums[:, 0] - values.mean() * sums[:, 1])
        for cluster, residual in zip(dict.fromkeys(clusters), own, strict=True):
            residuals[cluster] = residuals.get(cluster, 0.0) + float(residual)
    return math.hypot(*residuals.values())


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its bootstrap error bar, all in the unit of the number.

    The error bar is NaN for fewer than two clusters.

    Attributes:
        value: the number, computed from all rows.
        se: its standard error.
        low, high: its percentile interval.
        p_value: two-sided p-value of the number being 0. It is below 1 - level exactly where the
            interval excludes 0, except for ties.
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
        counts: what each row adds to each of k sums, shape (rows, k).
        clusters: the cluster (image) of each row.
        statistic: maps column sums, shape (..., k), to the statistic, shape (...).
        level: confidence level of the interval, in (0, 1).
        seed: random seed of the bootstrap.
        resamples: number of resamples.

    Raises:
        ValueError: see `cluster_resamples`; or `level` is not in (0, 1).

    Source: Efron and Tibshirani (1993), sections 13.3 (percentile interval) and 15.4 (the p-value
    that goes with it; one is added to both counts, as in Davison and Hinkley (1997), section 4.2,
    so that it is never 0).
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
    """How two models compare on the same questions. Rates are percentages, [0, 100]; differences
    are percentage points.

    Attributes:
        n: number of questions.
        clusters: number of images over which the error bars are computed (of questions, where no
            clusters were given).
        a, b: accuracy of the models. Higher is better.
        difference: b - a, with its error bar.
        only_a, only_b: number of questions that only this model answers correctly (the discordant
            questions).
        mcnemar_p: two-sided p-value of the exact McNemar test, which takes questions as
            independent.
        design_effect: how many times more clustered questions are needed than independent ones. NaN
            if no question is discordant or there are fewer than two clusters.
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
        """Share of questions that exactly one of the models answers correctly [%]."""
        return 100 * (self.only_a + self.only_b) / self.n


def paired_difference(
    correct_a: Sequence[bool],
    correct_b: Sequence[bool],
    clusters: Sequence[str] | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> PairedDifference:
    """The accuracies of A and B on the same questions, and their difference, B - A.

    Args:
        correct_a, correct_b: whether each model answers each question correctly.
        clusters: the image of each question; None makes every question its own cluster.
        level, seed, resamples: see `bootstrap_estimate`.

    Raises:
        ValueError: the sequences differ in length or are empty.
    """
    a, b = np.asarray(correct_a, dtype=float), np.asarray(correct_b, dtype=float)
    clusters = [str(n) for n in range(len(a))] if clusters is None else clusters
    if not len(a) == len(b) == len(clusters) > 0:
        raise ValueError(
            "correct_a, correct_b and clusters must have one length, above 0; "
            f"got {len(a)}, {len(b)} and {len(clusters)}"
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
    """Two-sided p-value of the exact McNemar test.

    If the models are equally good, either of them answers a discordant question correctly with
    probability 1/2.

    Source: McNemar, Psychometrika 12 (1947); the exact binomial form as in Agresti, Categorical
    Data Analysis, 10.1.

    Raises:
        ValueError: a count is negative, or their sum is more than 10^15.
    """
    from scipy.stats import binomtest

    if only_a < 0 or only_b < 0:
        raise ValueError(f"discordant counts cannot be negative: {only_a} and {only_b}")
    if only_a + only_b > MAX_QUESTIONS:
        raise ValueError(f"discordant counts can add up to {MAX_QUESTIONS:,}, and these are more")
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0


def questions_needed(
    difference: float,
    discordance: float,
    *,
    power: float = 0.8,
    alpha: float = 0.05,
    design_effect: float = 1.0,
) -> int:
    """The number of questions with which McNemar's test shows a difference between two models with
    a given power.

    Args:
        difference: true difference of the accuracies [percentage points], not 0; the sign is
            ignored.
        discordance: share of questions that exactly one of the models answers correctly [%], at
            least the difference.
        power: probability that the test shows the difference, in (0, 1).
        alpha: two-sided significance level of the test, in (0, 1).
        design_effect: factor on the number of questions; see `PairedDifference`.

    Raises:
        ValueError: an argument is outside its range, or more than 10^15 questions would be needed.

    Source: Connor, "Sample size for testing differences in proportions for the paired-sample
    design", Biometrics 43 (1987), 207-211, for the test without continuity correction; the exact
    test needs slightly more. Design effect: Kish, Survey Sampling (1965), section 8.2.
    """
    delta, psi = abs(difference) / 100, discordance / 100
    if not 0 < delta <= psi <= 1:
        raise ValueError(
            f"0 < difference <= discordance <= 100 is needed, not {difference} and {discordance}"
        )
    if not (0 < power < 1 and 0 < alpha < 1 and design_effect > 0):
        raise ValueError(
            f"power and alpha must be in (0, 1) and design_effect above 0; got {power}, {alpha} "
            f"and {design_effect}"
        )
    quantile = NormalDist().inv_cdf
    scaled = quantile(1 - alpha / 2) * math.sqrt(psi) + quantile(power) * math.sqrt(psi - delta**2)
    needed = math.sqrt(design_effect) * scaled / delta  # its square may exceed the largest float
    if not needed <= math.sqrt(MAX_QUESTIONS):
        raise ValueError(
            f"more than {MAX_QUESTIONS:,} questions would be needed for a difference of "
            f"{difference} points"
        )
    return math.ceil(design_effect * (scaled / delta) ** 2)
